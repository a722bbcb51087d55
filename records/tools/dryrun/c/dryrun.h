// What the stand-ins of a pretended H100 share. They are preloaded in front of NVIDIA's libraries,
// under a real CUDA build of torch: kernels compute nothing, device memory is address space, copies
// between host and device are real, and every launch, copy and wait of the host is written to a
// trace (README.md beside this folder).
#ifndef DRYRUN_H
#define DRYRUN_H
#include <cuda_runtime_api.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

// One line of the trace: kind, name and four numbers, whose meaning roofline.py knows.
void dryrun_log(const char *kind, const char *name, long a, long b, long c, long d);

// A collective. It alone takes time here; streams, events and the host stand behind one that is not
// done.
struct operation {
    volatile int done;
    int kind, root, type;
    const void *send;
    void *recv;
    long count;
    struct operation *next;
};

// Streams and events are both a place behind the last collective of a stream.
struct place {
    struct operation *last;
    int queued; // launches since then
};

struct place *place_of(cudaStream_t stream);

// Returns once the stream's last collective is done.
void wait_for(struct place *place);

// A launch into a stream: returns at once, but behind a pending collective only while there is room
// in the queue.
void dryrun_launch(const char *kind, const char *name, long a, long b, long c, long d,
                   cudaStream_t stream);

// An attribute of the device, by the numbers of cudaDeviceAttr and CUdevice_attribute, which agree.
int dryrun_attribute(int attribute);

#endif
