// The loops of `bank_ffn` for any CPU.
#include "activation.h"
#include "bank.h"

namespace fallow::bank::plain {

constexpr bool kFma = false;
#include "bank_lanes_plain.h"

#include "bank_kernels.h"

}  // namespace fallow::bank::plain

const fallow::bank::Kernels fallow::bank::plain_kernels = {
    fallow::bank::plain::W,         fallow::bank::plain::prepare,  fallow::bank::plain::dots,   fallow::bank::plain::round, fallow::bank::plain::coded_dots, fallow::bank::plain::magnitude,
    fallow::bank::plain::sigmoid2,  fallow::bank::plain::select,   fallow::bank::plain::mask,   fallow::bank::plain::ffn,   fallow::bank::plain::collect,
};
