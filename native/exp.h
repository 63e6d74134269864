// exp in fp32 as straight-line arithmetic, which loops over it vectorise; libm's is a call per element.
#pragma once

#include "simd.h"

namespace fallow {

// exp(x) for x <= 0 (and a little above), relative error below 2e-7: x = n ln 2 + r, polynomial in r, exponent bits for 2^n.
template <bool kFma>
FALLOW_INLINE float exp_nonpositive(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const float shifted = madd<kFma>(x, 1.44269504088896341f, kShift);
  const float n = shifted - kShift;
  float r = madd<kFma>(n, -0.693359375f, x);
  r = madd<kFma>(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = madd<kFma>(p, r, 1.3981999507e-3f);
  p = madd<kFma>(p, r, 8.3334519073e-3f);
  p = madd<kFma>(p, r, 4.1665795894e-2f);
  p = madd<kFma>(p, r, 1.6666665459e-1f);
  p = madd<kFma>(p, r, 5.0000001201e-1f);
  p = madd<kFma>(p, r * r, r) + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return x < -87.0f ? 0.0f : p * scale;
}

}  // namespace fallow
