// Launches of torch's own kernels: their names are those under which nvcc's generated code
// registers them.
#define _GNU_SOURCE
#include "dryrun.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct kernel {
    uintptr_t function;
    const char *name;
};

static struct kernel *kernels;
static size_t kernel_count, kernel_room, sorted_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

API void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[1];
    return handle;
}

API char __cudaInitModule(void **handle) { return 1; }

API void __cudaRegisterFunction(void **handle, const char *function, char *device_function,
                                const char *name, int limit, void *thread, void *block,
                                void *block_size, void *grid_size, int *warp) {
    if (kernel_count == kernel_room) {
        kernel_room = kernel_room ? 2 * kernel_room : 4096;
        kernels = realloc(kernels, kernel_room * sizeof *kernels);
    }
    kernels[kernel_count++] = (struct kernel){(uintptr_t)function, name};
}

static int by_function(const void *a, const void *b) {
    uintptr_t x = ((const struct kernel *)a)->function, y = ((const struct kernel *)b)->function;
    return (x > y) - (x < y);
}

static const char *name_of(const void *function) {
    struct kernel wanted = {(uintptr_t)function, NULL};
    pthread_mutex_lock(&lock);
    if (sorted_count != kernel_count) {
        qsort(kernels, kernel_count, sizeof *kernels, by_function);
        sorted_count = kernel_count;
    }
    struct kernel *found = bsearch(&wanted, kernels, kernel_count, sizeof *kernels, by_function);
    pthread_mutex_unlock(&lock);
    return found ? found->name : "unknown";
}

// <<<grid, block>>> is a push, a pop inside the kernel's host function, and a launch.
struct configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};

static __thread struct configuration configurations[8];
static __thread int depth;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                         struct CUstream_st *stream) {
    if (depth == 8)
        abort();
    configurations[depth++] = (struct configuration){grid, block, shared, stream};
    return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (!depth)
        abort();
    struct configuration *c = &configurations[--depth];
    *grid = c->grid;
    *block = c->block;
    *shared = c->shared;
    *(cudaStream_t *)stream = c->stream;
    return cudaSuccess;
}

static cudaError_t launch(const void *function, dim3 grid, dim3 block, cudaStream_t stream) {
    dryrun_launch("kernel", name_of(function), grid.x, grid.y, grid.z, block.x * block.y * block.z,
                  stream);
    return cudaSuccess;
}

API cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **a, size_t shared,
                                 cudaStream_t s) {
    return launch(f, grid, block, s);
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **a, size_t shared,
                                   cudaStream_t s) {
    return launch(f, grid, block, s);
}

API cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, void **a,
                                            size_t shared, cudaStream_t s) {
    return launch(f, grid, block, s);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) {
    return launch(f, c->gridDim, c->blockDim, c->stream);
}

API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = 90;
    a->maxDynamicSharedSizeBytes = 232448;
    return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *f, int size,
                                                              size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f,
                                                                       int size, size_t shared,
                                                                       unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

API cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    static char memory[1 << 16];
    *pointer = memory;
    return cudaSuccess;
}

// torch asks the runtime for functions of the driver by name.
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function,
                                                 unsigned version, unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *result) {
    static void *driver;
    char second[128];
    if (!driver)
        driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (!driver) {
        fprintf(stderr, "[dryrun] %s\n", dlerror());
        abort();
    }
    snprintf(second, sizeof second, "%s_v2", name);
    *function = dlsym(driver, name);
    if (!*function)
        *function = dlsym(driver, second);
    if (result)
        *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
