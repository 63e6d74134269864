// The bf16 tile products on AMX (native/block_amx.cpp): there where CPU, operating system and compiler have it, for tiles whose side
// is a multiple of 32.
#pragma once

#include "block_grid.h"

namespace fallow {

// Whether this process may use AMX tiles of bf16. The first call asks the operating system for it.
bool amx_available();

inline bool amx_serves(const BlockGrid& g) { return g.block % 32 == 0 && amx_available(); }

// As fallow_block_forward and fallow_block_backward. Only where amx_serves().
void amx_forward(const BlockGrid& g, const bf16* values, const bf16* x, const float* bias, bf16* y, int64_t tokens, int n_threads);
void amx_backward(const BlockGrid& g, const bf16* values, const bf16* x, const bf16* dy, bf16* dx, bf16* dvalues, int64_t tokens,
                  int n_threads);

}  // namespace fallow
