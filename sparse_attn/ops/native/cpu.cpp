// What this CPU has, and its operating system keeps for us.
#include "kernels.h"
#include "linear.h"
#include "runtime.h"

#if defined(FOVEATE_EMULATED)

// Every instruction is made of others: see tests/emulated.
bool foveate_cpu_has(int) { return true; }
bool foveate_cpu_has_linear(int) { return true; }

#elif defined(__x86_64__)

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct CpuId {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    CpuId(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

// State components that the operating system saves: AVX is 0x6, AVX-512 0xe6, AMX 0x60000.
bool saves(uint64_t components) {
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (((uint64_t(high) << 32) | low) & components) == components;
}

bool may_use_tiles() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

// Found once: a virtual machine is left whenever the CPU is asked.
struct Features {
    bool attention[FOVEATE_NUM_ISAS] = {}, linear[FOVEATE_LINEAR_NUM_ISAS] = {};

    Features() {
        const CpuId one(1, 0), seven(7, 0);
        const bool osxsave = one.ecx >> 27 & 1, fma = one.ecx >> 12 & 1, avx2 = seven.ebx >> 5 & 1;
        if (!osxsave || !fma || !avx2 || !saves(0x6)) return;
        const unsigned more = seven.eax >= 1 ? CpuId(7, 1).eax : 0;
        attention[FOVEATE_AVX2] = linear[FOVEATE_LINEAR_AVX2] = true;
        linear[FOVEATE_LINEAR_AVXVNNI] = more >> 4 & 1;
        const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
        if ((seven.ebx & avx512) != avx512 || !saves(0xe6)) return;
        const bool vnni = seven.ecx >> 11 & 1;
        attention[FOVEATE_AVX512] = true;
        attention[FOVEATE_AVX512BF16] = vnni && more >> 5 & 1;
        linear[FOVEATE_LINEAR_AVX512VNNI] = vnni;
        const bool tiles = seven.edx >> 24 & 1, tile_bf16 = seven.edx >> 22 & 1, tile_int8 = seven.edx >> 25 & 1;
        if (!tiles || !tile_bf16 || !tile_int8 || !saves(0x60000) || !may_use_tiles()) return;
        attention[FOVEATE_AMX] = attention[FOVEATE_AVX512BF16];
        linear[FOVEATE_LINEAR_AMX] = attention[FOVEATE_AMX];
    }
};

const Features& features() {
    static const Features found;
    return found;
}

}  // namespace

bool foveate_cpu_has(int isa) { return features().attention[isa]; }
bool foveate_cpu_has_linear(int isa) { return features().linear[isa]; }

#else

bool foveate_cpu_has(int) { return false; }
bool foveate_cpu_has_linear(int) { return false; }

#endif
