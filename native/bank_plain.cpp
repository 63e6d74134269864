// The loops of `bank_ffn` for any CPU.
#include "activation.h"
#include "bank.h"

namespace fallow::bank::plain {

constexpr bool kFma = false;
#include "bank_lanes_plain.h"

#include "bank_kernels.h"

}  // namespace fallow::bank::plain

namespace fallow::bank {

namespace k = plain;
const Kernels plain_kernels = {k::W,        k::prepare, k::dots, k::round, k::coded_dots, k::magnitude,
                              k::sigmoid2, k::select,  k::mask, k::ffn,   k::collect};

}  // namespace fallow::bank
