// The threads of team.h: libgomp's, by its stable entry points (also exported by LLVM's and Intel's runtimes), or started per call.
#include "team.h"

#include <memory>
#include <new>

#if defined(__unix__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace fallow {
namespace {

using Body = void (*)(void*);
struct OpenMp {
  void (*parallel)(Body, void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*size)() = nullptr;
};

#if defined(__unix__)
std::atomic<bool> forked{false};

const OpenMp* open_mp() {
  static const OpenMp found = [] {
    OpenMp f;
    f.parallel = reinterpret_cast<decltype(f.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    f.thread = reinterpret_cast<decltype(f.thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    f.size = reinterpret_cast<decltype(f.size)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
    return f;
  }();
  return found.parallel && found.thread && found.size && !forked.load() ? &found : nullptr;
}
#else
const OpenMp* open_mp() { return nullptr; }
#endif

// The size of an OpenMP team is known inside of it only: the first to come makes what all share.
struct Call {
  void (*work)(void*, Team&, int);
  void* context;
  const OpenMp* omp;
  std::atomic<int> state{0};  // 0 nobody came, 1 being made, 2 made
  alignas(Team) unsigned char place[sizeof(Team)];

  Team& team() {
    int nobody = 0;
    if (state.compare_exchange_strong(nobody, 1)) {
      new (place) Team(omp->size());
      state.store(2, std::memory_order_release);
    } else {
      while (state.load(std::memory_order_acquire) != 2) std::this_thread::yield();
    }
    return *std::launder(reinterpret_cast<Team*>(place));
  }
};

}  // namespace

void run_team(int n_threads, void (*work)(void*, Team&, int), void* context) {
  if (n_threads <= 1) {
    Team alone(1);
    return work(context, alone, 0);
  }
  if (const OpenMp* omp = open_mp()) {
    Call call{work, context, omp};
    omp->parallel(
        [](void* data) {
          Call& c = *static_cast<Call*>(data);
          c.work(c.context, c.team(), c.omp->thread());
        },
        &call, unsigned(n_threads), 0);
    return;
  }
  Team team(n_threads);
  std::vector<std::thread> threads;
  threads.reserve(size_t(n_threads - 1));
  for (int i = 1; i < n_threads; ++i) threads.emplace_back([&, i] { work(context, team, i); });
  work(context, team, 0);
  for (auto& thread : threads) thread.join();
}

}  // namespace fallow
