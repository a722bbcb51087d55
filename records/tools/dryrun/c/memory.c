// Devices and memory. Device memory is address space without pages until somebody writes to it, so
// that 80 GB fit anywhere; its sizes are those that torch's allocator asks for.
#define _GNU_SOURCE
#include "dryrun.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define REGIONS 65536
#define WHOLE_COPY (4 << 20) // bytes of a copy within the device up to which it is made
#define SMALL_SET (64 << 10) // bytes up to which memset writes other values than 0

struct region {
    char *start;
    size_t size;
    int pinned;
};

enum where { PAGEABLE, PINNED, DEVICE };

static struct region regions[REGIONS];
static int region_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used;
static __thread int device;

// ---- devices ----

static size_t device_bytes(void) {
    const char *gib = getenv("DRYRUN_GIB");
    return (gib ? atof(gib) : 79.19) * (1ull << 30);
}

API cudaError_t cudaGetDeviceCount(int *count) {
    const char *gpus = getenv("DRYRUN_GPUS");
    *count = gpus ? atoi(gpus) : 1;
    return cudaSuccess;
}

API cudaError_t cudaGetDevice(int *which) {
    *which = device;
    return cudaSuccess;
}

API cudaError_t cudaSetDevice(int which) {
    device = which;
    return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

// An H100 SXM of 80 GB as its driver describes it.
API int dryrun_attribute(int attribute) {
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
    case cudaDevAttrReservedSharedMemoryPerBlock:
        return 1024;
    case cudaDevAttrMaxBlockDimZ:
        return 64;
    case cudaDevAttrMaxGridDimX:
        return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
        return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        return 49152;
    case cudaDevAttrTotalConstantMemory:
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
        return 65536;
    case cudaDevAttrWarpSize:
    case cudaDevAttrMaxBlocksPerMultiprocessor:
        return 32;
    case cudaDevAttrClockRate:
        return 1980000;
    case cudaDevAttrMemoryClockRate:
        return 2619000;
    case cudaDevAttrMultiProcessorCount:
        return 132;
    case cudaDevAttrGlobalMemoryBusWidth:
        return 5120;
    case cudaDevAttrL2CacheSize:
        return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        return 2048;
    case cudaDevAttrComputeCapabilityMajor:
        return 9;
    case cudaDevAttrComputeCapabilityMinor:
        return 0;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        return 233472;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return 232448;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported:
    case 120: // cluster launch
        return 1;
    default:
        return 0;
    }
}

API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int which) {
    *value = dryrun_attribute(attribute);
    return cudaSuccess;
}

#undef cudaGetDeviceProperties
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int which) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H100 80GB HBM3");
    p->uuid.bytes[0] = which + 1;
    p->pciBusID = 16 + which;
    p->totalGlobalMem = device_bytes();
    p->major = 9;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->reservedSharedMemPerBlock = 1024;
    p->totalConstMem = 65536;
    p->l2CacheSize = 50 << 20;
    p->persistingL2CacheMaxSize = 32768000;
    p->memoryBusWidth = 5120;
    p->memPitch = 2147483647;
    p->textureAlignment = 512;
    p->texturePitchAlignment = 32;
    p->asyncEngineCount = 3;
    p->canMapHostMemory = p->concurrentKernels = p->ECCEnabled = p->unifiedAddressing = 1;
    p->streamPrioritiesSupported = p->globalL1CacheSupported = p->localL1CacheSupported = 1;
    p->managedMemory = p->cooperativeLaunch = p->clusterLaunch = p->memoryPoolsSupported = 1;
    return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) {
    *can = 1;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int which) {
    snprintf(text, size, "0000:%02x:00.0", 16 + which);
    return cudaSuccess;
}

API const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the pretended GPU";
}

API const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorOfPretendedGPU"; }

// ---- memory ----

static int find(const void *pointer) {
    const char *p = pointer;
    for (int i = region_count - 1; i >= 0; i--)
        if (p >= regions[i].start && p < regions[i].start + regions[i].size)
            return i;
    return -1;
}

static enum where where_is(const void *pointer) {
    pthread_mutex_lock(&lock);
    int i = find(pointer);
    enum where found = i < 0 ? PAGEABLE : regions[i].pinned ? PINNED : DEVICE;
    pthread_mutex_unlock(&lock);
    return found;
}

static void add(void *pointer, size_t size, int pinned) {
    pthread_mutex_lock(&lock);
    if (region_count == REGIONS) {
        fprintf(stderr, "[dryrun] more than %d allocations\n", REGIONS);
        abort();
    }
    regions[region_count++] = (struct region){pointer, size, pinned};
    pthread_mutex_unlock(&lock);
}

static size_t drop(void *pointer) {
    pthread_mutex_lock(&lock);
    int i = find(pointer);
    size_t size = 0;
    if (i >= 0) {
        size = regions[i].size;
        regions[i] = regions[--region_count];
    }
    pthread_mutex_unlock(&lock);
    return size;
}

API cudaError_t cudaMalloc(void **pointer, size_t size) {
    if (used + size > device_bytes())
        return cudaErrorMemoryAllocation;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *p = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED)
        return cudaErrorMemoryAllocation;
    add(p, size, 0);
    used += size;
    dryrun_log("malloc", "cudaMalloc", size, 0, 0, 0);
    *pointer = p;
    return cudaSuccess;
}

API cudaError_t cudaFree(void *pointer) {
    if (!pointer)
        return cudaSuccess;
    size_t size = drop(pointer);
    munmap(pointer, size);
    used -= size;
    dryrun_log("wait", "cudaFree", size, 0, 0, 0);
    return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *total = device_bytes();
    *unused = *total - used;
    return cudaSuccess;
}

API cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    *pointer = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    add(*pointer, size, 1);
    dryrun_log("hostalloc", "cudaHostAlloc", size, 0, 0, 0);
    return cudaSuccess;
}

API cudaError_t cudaFreeHost(void *pointer) {
    drop(pointer);
    free(pointer);
    return cudaSuccess;
}

API cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
    add(pointer, size, 1);
    return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void *pointer) {
    drop(pointer);
    return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *pointer) {
    static const enum cudaMemoryType types[] = {[PAGEABLE] = cudaMemoryTypeUnregistered,
                                                [PINNED] = cudaMemoryTypeHost,
                                                [DEVICE] = cudaMemoryTypeDevice};
    enum where where = where_is(pointer);
    memset(a, 0, sizeof *a);
    a->type = types[where];
    a->devicePointer = (void *)pointer;
    a->hostPointer = where == PINNED ? (void *)pointer : NULL;
    return cudaSuccess;
}

// ---- copies ----

// What the host reads from the device, no kernel has written: zeros, which would end the host's
// arithmetic (a division, a logarithm, a test for finite values), or whatever was left there. So
// single values are 1, or for integers at most a million, and arrays are bytes of 0x38 to 0x3b:
// small positive numbers in every type.
static void pretend(void *value, size_t size) {
    if (size == 1)
        *(char *)value = 1;
    if (size == 4 && *(float *)value == 0)
        *(float *)value = 1;
    if (size == 8 && *(uint64_t *)value > 1 << 20)
        *(uint64_t *)value = 0;
    if (size == 24) // three doubles, the sums of a validation: nats, targets, bytes
        for (double *x = value; x < (double *)value + 3; x++)
            if (*x == 0)
                *x = 1;
    uint32_t random = size;
    for (size_t i = 0; size > 32 && i < size; i++) {
        random = 1664525 * random + 1013904223;
        ((char *)value)[i] = 0x38 + (random >> 30);
    }
}

static void copy(void *to, const void *from, size_t size, int waits, cudaStream_t stream) {
    static const char *names[] = {
        [PAGEABLE] = "pageable", [PINNED] = "pinned", [DEVICE] = "device"};
    enum where source = where_is(from), target = where_is(to);
    char name[64];
    snprintf(name, sizeof name, "%s->%s", names[source], names[target]);
    // With pageable memory the host waits for the device although the call says "async".
    waits = waits || (source != target && (source == PAGEABLE || target == PAGEABLE));
    if (waits || target != DEVICE || source == DEVICE) // what a collective yields is waited for
        wait_for(place_of(stream));
    if (waits)
        dryrun_log("waitcopy", name, size, 0, 0, 0);
    else
        dryrun_launch("copy", name, size, 0, 0, 0, stream);
    if (source != DEVICE || target != DEVICE || size <= WHOLE_COPY)
        memmove(to, from, size);
    if (source == DEVICE && target != DEVICE)
        pretend(to, size);
}

API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                                cudaStream_t s) {
    copy(to, from, size, 0, s);
    return cudaSuccess;
}

API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    copy(to, from, size, 1, 0);
    return cudaSuccess;
}

// Gives the pages of whole zeros back: an optimizer's state of zeros costs nothing.
static void zero(char *start, size_t size) {
    uintptr_t first = ((uintptr_t)start + 4095) & ~(uintptr_t)4095;
    uintptr_t end = ((uintptr_t)start + size) & ~(uintptr_t)4095;
    madvise((void *)first, end - first, MADV_DONTNEED);
    memset(start, 0, first - (uintptr_t)start);
    memset((void *)end, 0, (uintptr_t)start + size - end);
}

API cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    dryrun_launch("memset", "memset", size, value, 0, 0, stream);
    if (size <= SMALL_SET)
        memset(to, value, size);
    else if (!value)
        zero(to, size);
    return cudaSuccess;
}

API cudaError_t cudaMemset(void *to, int value, size_t size) {
    return cudaMemsetAsync(to, value, size, 0);
}
