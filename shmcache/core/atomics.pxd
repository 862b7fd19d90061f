# Loads, stores and fences on shared bytes. Whatever another process may write at the same time is read by one of these
# and by nothing else: a plain field may be read twice by the compiler, once before a check and once after.
# Every step of a protocol is a release store: crash order is store order.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #define SHM_LD(name, T) static inline T name(const T *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    #define SHM_LDR(name, T) static inline T name(const T *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    #define SHM_ST(name, T) static inline void name(T *p, T v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    SHM_LD(ld64, uint64_t) SHM_LD(ld32, uint32_t)
    SHM_LDR(ld64r, uint64_t) SHM_LDR(ld32r, uint32_t) SHM_LDR(ld16r, uint16_t) SHM_LDR(ld8r, uint8_t)
    SHM_LDR(ldi64r, int64_t)
    SHM_ST(st64, uint64_t) SHM_ST(st32, uint32_t) SHM_ST(st16, uint16_t) SHM_ST(st8, uint8_t)
    static inline void st8r(uint8_t *p, uint8_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static inline int cas64(uint64_t *p, uint64_t a, uint64_t b)
    { return __atomic_compare_exchange_n(p, &a, b, 0, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE); }
    static inline int cas32(uint32_t *p, uint32_t a, uint32_t b)
    { return __atomic_compare_exchange_n(p, &a, b, 0, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE); }
    static inline uint64_t xchg64(uint64_t *p, uint64_t v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t add64(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
    static inline uint64_t sub64(uint64_t *p, uint64_t v) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t or64(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t and64(uint64_t *p, uint64_t v) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }
    static inline void fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
    static inline void fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
    static inline uint64_t mulhi64(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }
    static inline void prefetch(const void *p) { __builtin_prefetch(p); }
    static inline void prefetch_w(const void *p) { __builtin_prefetch(p, 1); }
    #if defined(__x86_64__)
    static inline void cpu_pause(void) { __builtin_ia32_pause(); }
    #else
    static inline void cpu_pause(void) { __asm__ __volatile__("yield"); }
    #endif
    #define likely(x) __builtin_expect(!!(x), 1)
    #define unlikely(x) __builtin_expect(!!(x), 0)
    """
    uint64_t ld64(const uint64_t* p) noexcept nogil
    uint64_t ld64r(const uint64_t* p) noexcept nogil
    int64_t ldi64r(const int64_t* p) noexcept nogil
    uint32_t ld32(const uint32_t* p) noexcept nogil
    uint32_t ld32r(const uint32_t* p) noexcept nogil
    uint16_t ld16r(const uint16_t* p) noexcept nogil
    uint8_t ld8r(const uint8_t* p) noexcept nogil
    void st64(uint64_t* p, uint64_t v) noexcept nogil
    void st32(uint32_t* p, uint32_t v) noexcept nogil
    void st8(uint8_t* p, uint8_t v) noexcept nogil
    void st8r(uint8_t* p, uint8_t v) noexcept nogil
    bint cas64(uint64_t* p, uint64_t expected, uint64_t wanted) noexcept nogil
    bint cas32(uint32_t* p, uint32_t expected, uint32_t wanted) noexcept nogil
    uint64_t xchg64(uint64_t* p, uint64_t v) noexcept nogil
    uint64_t add64(uint64_t* p, uint64_t v) noexcept nogil
    uint64_t sub64(uint64_t* p, uint64_t v) noexcept nogil
    uint64_t or64(uint64_t* p, uint64_t v) noexcept nogil
    uint64_t and64(uint64_t* p, uint64_t v) noexcept nogil
    void fence_acquire() noexcept nogil
    void fence_release() noexcept nogil
    uint64_t mulhi64(uint64_t a, uint64_t b) noexcept nogil
    void prefetch(const void* p) noexcept nogil
    void prefetch_w(const void* p) noexcept nogil
    void cpu_pause() noexcept nogil
    bint likely(bint x) noexcept nogil
    bint unlikely(bint x) noexcept nogil
