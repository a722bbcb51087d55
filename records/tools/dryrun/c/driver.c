// libcuda.so.1 of the pretended H100, through which Triton loads and launches its kernels. The
// registers and the stack of a kernel are read out of its cubin.
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define KERNELS 16
#define CONTEXT ((CUcontext)0x10)

// From the other library, which is preloaded where there is a GPU to pretend.
extern int dryrun_attribute(int attribute) __attribute__((weak));
extern void dryrun_launch(const char *, const char *, long, long, long, long, CUstream)
    __attribute__((weak));

struct CUfunc_st {
    char name[256];
    int registers, stack;
};

struct CUmod_st {
    struct CUfunc_st kernels[KERNELS];
    int count;
};

// ---- device and context ----

API CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

API CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int *count) {
    const char *gpus = getenv("DRYRUN_GPUS");
    *count = gpus ? atoi(gpus) : 1;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = dryrun_attribute ? dryrun_attribute(attribute) : 0;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    snprintf(name, size, "NVIDIA H100 80GB HBM3");
    return CUDA_SUCCESS;
}

API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    *bytes = 79ull << 30;
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = CONTEXT;
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 1 << 20;
    return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = CONTEXT;
    return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

API CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "an error of the pretended GPU";
    return CUDA_SUCCESS;
}

API CUresult cuGetErrorName(CUresult error, const char **text) {
    return cuGetErrorString(error, text);
}

API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute,
                                   CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

API CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **values,
                                    CUdeviceptr pointer) {
    for (unsigned i = 0; i < count; i++)
        *(CUdeviceptr *)values[i] =
            attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER ? pointer : 0;
    return CUDA_SUCCESS;
}

// ---- modules ----

#define SIZED_VALUE 4   // format of an entry of .nv.info: a size and so many bytes
#define FRAME_SIZE 0x11 // attributes: bytes of stack a thread
#define REGISTERS 0x2f  // registers a thread

struct info {
    int stack, registers;
};

// The largest values that a section .nv.info holds.
static struct info read_info(const unsigned char *at, const unsigned char *end) {
    struct info info = {0, 0};
    while (at + 4 <= end) {
        uint16_t size;
        int value;
        memcpy(&size, at + 2, sizeof size);
        if (at[0] != SIZED_VALUE) {
            at += 4;
            continue;
        }
        if (size >= 8 && at + 4 + size <= end) {
            memcpy(&value, at + 8, sizeof value);
            if (at[1] == FRAME_SIZE && value > info.stack)
                info.stack = value;
            if (at[1] == REGISTERS && value > info.registers)
                info.registers = value;
        }
        at += 4 + size;
    }
    return info;
}

static void read_cubin(CUmodule module, const char *image) {
    const Elf64_Ehdr *header = (const void *)image;
    const Elf64_Shdr *sections = (const void *)(image + header->e_shoff);
    const char *names = image + sections[header->e_shstrndx].sh_offset;
    struct info info = {0, 0};
    for (int i = 0; i < header->e_shnum; i++) {
        const Elf64_Shdr *s = &sections[i];
        const char *name = names + s->sh_name;
        const unsigned char *content = (const unsigned char *)image + s->sh_offset;
        if (!strcmp(name, ".nv.info"))
            info = read_info(content, content + s->sh_size);
        if (!strncmp(name, ".text.", 6) && module->count < KERNELS)
            snprintf(module->kernels[module->count++].name, sizeof module->kernels->name, "%s",
                     name + 6);
    }
    for (int i = 0; i < module->count; i++) {
        module->kernels[i].stack = info.stack;
        module->kernels[i].registers = info.registers;
    }
}

API CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count,
                                CUjit_option *options, void **values) {
    *module = calloc(1, sizeof **module);
    if (!memcmp(image, ELFMAG, SELFMAG))
        read_cubin(*module, image);
    return CUDA_SUCCESS;
}

API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    return cuModuleLoadDataEx(module, image, 0, NULL, NULL);
}

API CUresult cuModuleLoad(CUmodule *module, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file)
        return CUDA_ERROR_FILE_NOT_FOUND;
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char *image = calloc(1, size + SELFMAG);
    size_t count = fread(image, 1, size, file);
    fclose(file);
    if (count != (size_t)size)
        return CUDA_ERROR_INVALID_IMAGE;
    return cuModuleLoadData(module, image);
}

API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    for (int i = 0; i < module->count; i++)
        if (!strcmp(module->kernels[i].name, name)) {
            *function = &module->kernels[i];
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_NOT_FOUND;
}

API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = 1024;
        break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
        *value = function->stack;
        break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
        *value = function->registers;
        break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
        *value = 90;
        break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
        *value = 232448;
        break;
    default:
        *value = 0;
    }
    return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction f, int size,
                                                         size_t shared) {
    *blocks = 2;
    return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction f,
                                          const CUlaunchConfig *config) {
    *clusters = 66;
    return CUDA_SUCCESS;
}

// ---- launches ----

API CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                            unsigned by, unsigned bz, unsigned shared, CUstream stream,
                            void **arguments, void **extra) {
    if (dryrun_launch)
        dryrun_launch("triton", f->name, gx, gy, gz, bx * by * bz, stream);
    return CUDA_SUCCESS;
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments,
                              void **extra) {
    return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY,
                          c->blockDimZ, c->sharedMemBytes, c->hStream, arguments, extra);
}

API CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                                 CUdriverProcAddressQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result)
        *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_SUCCESS;
}
