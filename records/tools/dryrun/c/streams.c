// Streams, events and what waits for them. All work is done at once except collectives.
#include "dryrun.h"
#include <stdlib.h>
#include <unistd.h>

static struct place default_stream;

// Launches that a GPU takes in behind one that is not done; the next blocks the host, in the
// launch.
static int queue_length(void) {
    static int length;
    if (!length) {
        const char *given = getenv("DRYRUN_QUEUE");
        length = given ? atoi(given) : 1024;
    }
    return length;
}

struct place *place_of(cudaStream_t stream) {
    // Small numbers stand for the default stream, of the process (0, 1) and of the thread (2).
    return (uintptr_t)stream < 16 ? &default_stream : (struct place *)stream;
}

static int ready(struct place *place) { return !place->last || place->last->done; }

void wait_for(struct place *place) {
    while (!ready(place))
        usleep(100);
}

API void dryrun_launch(const char *kind, const char *name, long a, long b, long c, long d,
                       cudaStream_t stream) {
    struct place *place = place_of(stream);
    dryrun_log(kind, name, a, b, c, d);
    place->queued = ready(place) ? 0 : place->queued + 1;
    if (place->queued > queue_length())
        wait_for(place);
}

static struct place *new_place(void) { return calloc(1, sizeof(struct place) + 16); }

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = (cudaStream_t)new_place();
    return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

API cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithPriority(stream, 0, 0);
}

API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int *lowest, int *highest) {
    *lowest = 0;
    *highest = -5;
    return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

#undef cudaStreamGetCaptureInfo
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                         unsigned long long *id, cudaGraph_t *graph,
                                         const cudaGraphNode_t **nodes,
                                         const cudaGraphEdgeData **edges, size_t *count) {
    if (status)
        *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

API cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return ready(place_of(stream)) ? cudaSuccess : cudaErrorNotReady;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    dryrun_log("wait", "cudaStreamSynchronize", 0, 0, 0, 0);
    wait_for(place_of(stream));
    return cudaSuccess;
}

API cudaError_t cudaDeviceSynchronize(void) {
    dryrun_log("wait", "cudaDeviceSynchronize", 0, 0, 0, 0);
    wait_for(&default_stream);
    return cudaSuccess;
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    struct place *place = place_of(stream), *behind = (struct place *)event;
    if (!ready(behind))
        place->last = behind->last;
    return cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)new_place();
    return cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ((struct place *)event)->last = place_of(stream)->last;
    return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}

API cudaError_t cudaEventQuery(cudaEvent_t event) {
    return ready((struct place *)event) ? cudaSuccess : cudaErrorNotReady;
}

API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    dryrun_log("wait", "cudaEventSynchronize", 0, 0, 0, 0);
    wait_for((struct place *)event);
    return cudaSuccess;
}

// Any time is as wrong as any other.
#undef cudaEventElapsedTime
API cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = 0.1f;
    return cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
    wait_for(place_of(stream));
    function(argument);
    return cudaSuccess;
}

API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function,
                                      void *argument, unsigned x) {
    wait_for(place_of(stream));
    function(stream, cudaSuccess, argument);
    return cudaSuccess;
}
