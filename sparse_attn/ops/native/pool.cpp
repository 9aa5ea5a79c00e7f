// The threads of pool.h.
#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>

namespace {

using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free);

void sleep_while(Word& word, uint32_t value) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake(Word& word, int count) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0); }

// Waits until ``ready()`` for a while, spinning. A thread that sleeps takes 50 us to be there; between two calls of a
// decode step there are a few.
template <class Ready>
bool spin(Ready ready) {
    constexpr auto kWhile = std::chrono::microseconds(100);
    const auto end = std::chrono::steady_clock::now() + kWhile;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            _mm_pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// One call at a time. ``state_`` says which, whether threads may still join it, how many have, and how many are at work.
class Pool {
public:
    void run(void (*body)(void*), void* data, unsigned threads, foveate_parallel torchs) {
        if (busy_.exchange(true, std::memory_order_acquire)) return body(data);
        torchs_ = torchs;
        helpers_ = threads - 1;  // before the first of them begins, which asks for as many
        while (workers_ + 1 < threads && start_worker()) ++workers_;
        body_ = body;
        data_ = data;
        state_.store((state_.load(std::memory_order_relaxed) | (kCall - 1)) + 1 + kOpen);
        bell_.fetch_add(1);
        const unsigned awake = workers_ - sleepers_.load();
        if (awake < threads - 1) wake(bell_, int(threads - 1 - awake));
        body(data);
        state_.fetch_and(~kOpen);
        const auto done = [this] { return state_.load() % kJoined == 0; };
        while (!spin(done)) {
            const uint32_t seen = ended_.load();
            waiting_ = true;
            if (!done()) sleep_while(ended_, seen);
            waiting_ = false;
        }
        busy_.store(false, std::memory_order_release);
    }

private:
    static constexpr uint64_t kAtWork = 1, kJoined = 1 << 15, kOpen = 1 << 30, kCall = uint64_t(1) << 31;

    bool start_worker() {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the process's own threads
        bool started = true;
        try {
            std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {
            started = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return started;
    }

    [[noreturn]] void work() {
        pthread_setname_np(pthread_self(), "foveate-cpu");
        // Two teams have more threads than there are CPUs, and then OpenMP lets idle ones sleep soon. Else torch's, between
        // the calls to us, would hold the CPUs for milliseconds that our threads want.
        if (const foveate_parallel torchs = torchs_; torchs && !calm_.exchange(true))
            torchs([](void*) {}, nullptr, helpers_ + 1, 0);
        for (uint64_t last = 0;;) {
            const auto called = [&] {
                const uint64_t state = state_.load(std::memory_order_acquire);
                return (state & kOpen) && state / kCall != last;
            };
            while (!spin(called)) {
                const uint32_t seen = bell_.load();
                sleepers_.fetch_add(1);
                if (!called()) sleep_while(bell_, seen);
                sleepers_.fetch_sub(1);
            }
            uint64_t state = state_.load(std::memory_order_acquire);
            while ((state & kOpen) && state / kCall != last && state % kOpen / kJoined < helpers_)
                if (state_.compare_exchange_weak(state, state + kJoined + kAtWork, std::memory_order_acq_rel)) {
                    body_(data_);
                    if (--state_ % kJoined == 0) {
                        ++ended_;
                        if (waiting_) wake(ended_, 1);
                    }
                    break;
                }
            last = state / kCall;
        }
    }

    std::atomic<bool> busy_{false};  // someone calls
    unsigned workers_ = 0;
    std::atomic<foveate_parallel> torchs_{nullptr};
    std::atomic<bool> calm_{false};           // torch's threads soon sleep
    void (*body_)(void*) = nullptr;           // of the call
    void* data_ = nullptr;                    // likewise
    std::atomic<unsigned> helpers_{0};        // that it wants at most
    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) Word bell_{0};  // calls
    Word sleepers_{0};
    alignas(64) Word ended_{0};  // times that the last thread at work was done
    std::atomic<bool> waiting_{false};
};

alignas(Pool) char g_memory[sizeof(Pool)];

// Never destroyed: its threads run to the end of the process. A forked process has none of them, and begins anew.
Pool& pool() {
    static Pool* const made = [] {
        pthread_atfork(nullptr, nullptr, [] { new (g_memory) Pool; });
        return new (g_memory) Pool;
    }();
    return *made;
}

}  // namespace

void foveate_pool_run(void (*body)(void*), void* data, unsigned threads, foveate_parallel torchs) {
    pool().run(body, data, threads, torchs);
}
