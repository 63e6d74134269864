// Threads that start in about a microsecond, for calls that last tens of them: the OpenMP team that PyTorch keeps, found at run time,
// so that no second set of threads spins beside it on the same cores. Without one, and in a forked child (whose team is gone),
// threads are started per call as `parallel` of simd.h does. An own pool that spins would fight with PyTorch's for the cores after
// each change of hands, as decoding does twice a layer.
#pragma once

#include <atomic>

#include "simd.h"

namespace fallow {

// What the threads of one call share. `wait` is a barrier that spins, and lets others run where there are more threads than cores.
class Team {
 public:
  explicit Team(int size) : size(size) {}
  const int size;

  void wait() {
    if (size == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round;) {
      if (++spins < 2000) pause();
      else std::this_thread::yield();
    }
  }

 private:
  static void pause() {
#if FALLOW_X86
    __builtin_ia32_pause();
#endif
  }
  std::atomic<int> arrived_{0}, round_{0};
};

// work(context, team, thread) on at most n_threads threads, the caller being number 0; returns when all have.
void run_team(int n_threads, void (*work)(void* context, Team& team, int thread), void* context);

template <class Work>
void with_team(int n_threads, const Work& work) {
  run_team(
      n_threads, [](void* context, Team& team, int thread) { (*static_cast<const Work*>(context))(team, thread); },
      const_cast<void*>(static_cast<const void*>(&work)));
}

}  // namespace fallow
