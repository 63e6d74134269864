// Activations in fp32 as straight-line arithmetic, which loops over them vectorise: `value` is a(z), `slope` is da/dz and puts
// a(z) in *value.
#pragma once

#include "exp.h"

namespace fallow {

struct Relu {
  template <bool kFma>
  static FALLOW_INLINE float value(float z) {
    return z < 0.0f ? 0.0f : z;
  }
  template <bool kFma>
  static FALLOW_INLINE float slope(float z, float* value) {
    *value = z < 0.0f ? 0.0f : z;
    return z <= 0.0f ? 0.0f : 1.0f;
  }
};

struct Relu2 {
  template <bool kFma>
  static FALLOW_INLINE float value(float z) {
    const float r = z < 0.0f ? 0.0f : z;
    return r * r;
  }
  template <bool kFma>
  static FALLOW_INLINE float slope(float z, float* value) {
    const float r = z < 0.0f ? 0.0f : z;
    *value = r * r;
    return 2.0f * r;
  }
};

template <bool kFma>
FALLOW_INLINE float sigmoid(float z) {
  const float e = exp_nonpositive<kFma>(z < 0.0f ? z : -z);
  return (z < 0.0f ? e : 1.0f) / (1.0f + e);
}

struct Silu {
  template <bool kFma>
  static FALLOW_INLINE float value(float z) {
    return z * sigmoid<kFma>(z);
  }
  template <bool kFma>
  static FALLOW_INLINE float slope(float z, float* value) {
    const float s = sigmoid<kFma>(z);
    *value = z * s;
    return s * (1.0f + z * (1.0f - s));
  }
};

// z sigmoid(2 c (z + 0.044715 z^3)), which is the form with tanh.
struct GeluTanh {
  static constexpr float kTwoC = 1.5957691216057308f, kCubic = 0.044715f;
  template <bool kFma>
  static FALLOW_INLINE float value(float z) {
    return z * sigmoid<kFma>(kTwoC * z * (1.0f + kCubic * z * z));
  }
  template <bool kFma>
  static FALLOW_INLINE float slope(float z, float* value) {
    const float s = sigmoid<kFma>(kTwoC * z * (1.0f + kCubic * z * z));
    *value = z * s;
    return s + z * s * (1.0f - s) * kTwoC * (1.0f + 3.0f * kCubic * z * z);
  }
};

// z times the normal distribution function, by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
struct Gelu {
  template <bool kFma>
  static FALLOW_INLINE float slope(float z, float* value) {
    const float positive = z < 0.0f ? -z : z;
    const float bell = exp_nonpositive<kFma>(-0.5f * z * z);
    const float t = 1.0f / madd<kFma>(0.3275911f * 0.70710678118654752f, positive, 1.0f);
    float p = 1.061405429f;
    p = madd<kFma>(p, t, -1.453152027f);
    p = madd<kFma>(p, t, 1.421413741f);
    p = madd<kFma>(p, t, -0.284496736f);
    p = madd<kFma>(p, t, 0.254829592f);
    const float tail = 0.5f * p * t * bell;
    const float below = z < 0.0f ? tail : 1.0f - tail;
    *value = z * below;
    return madd<kFma>(z * 0.39894228040143268f, bell, below);
  }
  template <bool kFma>
  static FALLOW_INLINE float value(float z) {
    float found;
    slope<kFma>(z, &found);
    return found;
  }
};

}  // namespace fallow
