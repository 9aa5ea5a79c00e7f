// Threads of the library's own, for processes that let it have them (`foveate_keep_threads`).
//
// OpenMP, which torch's threads are, waits at the end of every call for each of its threads, whether there was work left
// for it or not, and its idle threads spin for milliseconds. Where something else wants a CPU too, a call waits for a
// thread that is not running while another spins: on two cores beside one busy process a decode step of SmolLM2 took
// 22 to 29 ms (and in one run 403), and takes 10 to 16 with these; 6 where nothing else runs, with either
// (docs/cpu.md). Here whoever calls works, and others help if they are awake in time: nobody waits for a thread that has
// not begun, and idle ones soon sleep.
#pragma once

#include "kernels.h"

// Runs ``body(data)`` on the caller's thread and on up to ``threads - 1`` others, and waits for those that began. ``body``
// takes work until none is left, so any number of them may run it: a second caller, or one within ``body``, runs its own
// alone. ``torchs`` is OpenMP's way to do the same.
void foveate_pool_run(void (*body)(void*), void* data, unsigned threads, foveate_parallel torchs);
