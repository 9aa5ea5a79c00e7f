// What every kernel of the library shares: the CPU's features, threads, and scratch memory.
#pragma once

#include <cstdint>

// Do this CPU and its kernel have it? ``isa`` as in kernels.h. Asks for leave to use AMX.
bool foveate_cpu_has(int isa);

// The same for quantised linear layers: ``isa`` as in linear.h.
bool foveate_cpu_has_linear(int isa);

// Runs ``body(data)`` on up to that many threads, torch's or the library's own, the caller's among them, and waits.
void foveate_on_threads(void (*body)(void*), void* data, int64_t threads);

// This thread's scratch memory number 0, 1, 2 or 3, kept between calls; null when no memory was left.
void* foveate_scratch(int64_t bytes, int number);
