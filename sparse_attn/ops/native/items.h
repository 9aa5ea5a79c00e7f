// How a call is spread over threads: item by item, whoever is free takes the next.
#pragma once

#include <atomic>
#include <cstdint>

#include "runtime.h"

namespace {

// Threads worth waking to pass over so many bytes: one that is woken for less than 64 KiB costs more than it saves.
inline int64_t threads_for(int64_t num_threads, int64_t bytes) {
    const int64_t useful = bytes / (64 * 1024) + 1;
    return num_threads < useful ? num_threads : useful;
}

// Runs ``work(item)`` for each item, on at most ``threads`` of torch's threads, the caller's among them.
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
