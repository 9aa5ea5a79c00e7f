// How a call is spread over threads: item by item, whoever is free takes the next.
#pragma once

#include <atomic>
#include <cstdint>

#include "runtime.h"

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads worth waking to pass over so many bytes: one that is woken for less than 64 KiB costs more than it saves.
inline int64_t threads_for(int64_t num_threads, int64_t bytes) {
    const int64_t useful = bytes / (64 * 1024) + 1;
    return num_threads < useful ? num_threads : useful;
}

// Runs ``work(item)`` for each item, on at most ``threads`` threads, the caller's among them.
template <class Work>
void run_items(int64_t items, int64_t threads, Work work) {
    struct Shared {
        Work& work;
        int64_t items;
        std::atomic<int64_t> next{0};
    } shared{work, items};
    auto body = [](void* data) {
        Shared& shared = *static_cast<Shared*>(data);
        for (int64_t i; (i = shared.next.fetch_add(1)) < shared.items;) shared.work(i);
    };
    foveate_on_threads(body, &shared, threads < items ? threads : items);
}

// Of kernels that need no tiles of bytes configured.
struct NoSetup {
    void begin() const {}
    void end() const {}
};

// Runs ``work(item, scratch)`` likewise, each thread with ``bytes`` of scratch memory, between ``begin`` and ``end`` of the
// kernels. Returns 1 if there was no memory. Items with the most work should come first.
template <class Kernels, class Work>
int run_items(const Kernels& kernels, int64_t items, int64_t threads, int64_t bytes, Work work) {
    struct Shared {
        const Kernels& kernels;
        Work& work;
        int64_t items, bytes;
        std::atomic<int64_t> next{0};
        std::atomic<int> failed{0};
    } shared{kernels, work, items, bytes};
    auto body = [](void* data) {
        Shared& shared = *static_cast<Shared*>(data);
        void* scratch = shared.bytes ? foveate_scratch(shared.bytes, 0) : nullptr;
        if (shared.bytes && !scratch) {
            shared.failed = 1;
            return;
        }
        shared.kernels.begin();
        for (int64_t i; (i = shared.next.fetch_add(1)) < shared.items;) shared.work(i, scratch);
        shared.kernels.end();
    };
    foveate_on_threads(body, &shared, threads < items ? threads : items);
    return shared.failed;
}

// Runs ``rows(call, first, last)`` over the call's rows, so many at a time as have about ``elements`` elements.
template <class Call, class Rows>
void run_rows(const Call& call, Rows rows, int64_t elements) {
    const int64_t step = 1 + elements / (call.width + 1);
    run_items((call.rows + step - 1) / step, call.num_threads, [&](int64_t i) {
        const int64_t first = i * step, last = first + step;
        rows(call, first, last < call.rows ? last : call.rows);
    });
}

}  // namespace
