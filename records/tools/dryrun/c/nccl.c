// NCCL between processes of this machine. Every collective is a barrier, worked off by a thread of
// each communicator, so that ranks that never come leave the others waiting as on a GPU; up to SLOT
// bytes a rank the values are real as well. Larger ones keep what they held.
#define _GNU_SOURCE
#include "dryrun.h"
#include <fcntl.h>
#include <nccl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RANKS 16
#define SLOT (2 << 20)
#define SLOTS 4 // collectives between which a fast rank and a slow one may be apart

// What the processes share: how many collectives a rank has come to and has read the others' values
// of.
struct meeting {
    volatile long arrived[RANKS], left[RANKS], joined;
    char data[SLOTS][RANKS][SLOT];
};

struct ncclComm {
    int size, rank;
    volatile int aborted;
    long number; // of the collective that is next
    struct meeting *meeting;
    struct operation *head, *tail;
    pthread_mutex_t lock;
};

enum kind { ALL_REDUCE, BROADCAST, ALL_GATHER };

static size_t width(int type) {
    static const size_t widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; // by ncclDataType_t
    return widths[type];
}

#define ADD(TYPE)                                                                                  \
    for (long i = 0; i < o->count; i++) {                                                          \
        TYPE sum = 0;                                                                              \
        for (int r = 0; r < size; r++)                                                             \
            sum += ((TYPE *)data[r])[i];                                                           \
        ((TYPE *)o->recv)[i] = sum;                                                                \
    }

// Sums whatever the operation: values are pretended anyway, but counters and flags must add up.
static void reduce(struct operation *o, char data[RANKS][SLOT], int size) {
    if (o->type == ncclFloat32)
        ADD(float)
    if (o->type == ncclFloat64)
        ADD(double)
    if (o->type == ncclInt32)
        ADD(int)
    if (o->type == ncclInt64)
        ADD(long)
}

static void exchange(struct ncclComm *c, struct operation *o, char data[RANKS][SLOT]) {
    size_t bytes = o->count * width(o->type);
    if (o->kind == ALL_REDUCE)
        reduce(o, data, c->size);
    if (o->kind == BROADCAST)
        memcpy(o->recv, data[o->root], bytes);
    if (o->kind == ALL_GATHER)
        for (int r = 0; r < c->size; r++)
            memcpy((char *)o->recv + r * bytes, data[r], bytes);
}

static void wait_until(struct ncclComm *c, volatile long *counters, long least) {
    for (int r = 0; r < c->size; r++)
        while (counters[r] < least && !c->aborted)
            usleep(20);
}

static void meet(struct ncclComm *c, struct operation *o) {
    struct meeting *m = c->meeting;
    int slot = c->number % SLOTS;
    int small = o->count * width(o->type) <= SLOT;
    wait_until(c, m->left, c->number - SLOTS + 1);
    if (small)
        memcpy(m->data[slot][c->rank], o->send, o->count * width(o->type));
    __sync_synchronize();
    m->arrived[c->rank] = c->number + 1;
    wait_until(c, m->arrived, c->number + 1);
    if (c->aborted)
        return;
    if (small)
        exchange(c, o, m->data[slot]);
    __sync_synchronize();
    m->left[c->rank] = ++c->number;
}

static void *work(void *argument) {
    struct ncclComm *c = argument;
    while (!c->aborted) {
        pthread_mutex_lock(&c->lock);
        struct operation *o = c->head;
        pthread_mutex_unlock(&c->lock);
        if (!o) {
            usleep(50);
            continue;
        }
        meet(c, o);
        pthread_mutex_lock(&c->lock);
        c->head = o->next;
        if (!c->head)
            c->tail = NULL;
        pthread_mutex_unlock(&c->lock);
        o->done = 1;
    }
    for (struct operation *o = c->head; o; o = o->next)
        o->done = 1;
    return NULL;
}

static ncclResult_t begin(ncclComm_t c, enum kind kind, const void *send, void *recv, size_t count,
                          ncclDataType_t type, int root, cudaStream_t stream) {
    static const char *names[] = {"allreduce", "broadcast", "allgather"};
    struct operation *o = calloc(1, sizeof *o);
    *o = (struct operation){
        .kind = kind, .root = root, .type = type, .send = send, .recv = recv, .count = count};
    o->done = c->aborted;
    dryrun_launch("nccl", names[kind], count, type, count * width(type), c->size, stream);
    pthread_mutex_lock(&c->lock);
    if (c->tail)
        c->tail->next = o;
    else
        c->head = o;
    c->tail = o;
    pthread_mutex_unlock(&c->lock);
    place_of(stream)->last = o;
    return ncclSuccess;
}

API ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t c, cudaStream_t stream) {
    return begin(c, ALL_REDUCE, send, recv, count, type, 0, stream);
}

API ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type,
                               int root, ncclComm_t c, cudaStream_t stream) {
    return begin(c, BROADCAST, send, recv, count, type, root, stream);
}

API ncclResult_t ncclBcast(void *both, size_t count, ncclDataType_t type, int root, ncclComm_t c,
                           cudaStream_t stream) {
    return begin(c, BROADCAST, both, both, count, type, root, stream);
}

API ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type,
                               ncclComm_t c, cudaStream_t stream) {
    return begin(c, ALL_GATHER, send, recv, count, type, 0, stream);
}

API ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

API const char *ncclGetErrorString(ncclResult_t error) { return "an error of the pretended NCCL"; }

API const char *ncclGetLastError(ncclComm_t c) { return ""; }

// The id is the name of the file that the ranks share.
API ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static int ids;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/dev/shm/dryrun-nccl-%d-%d", getpid(), ids++);
    return ncclSuccess;
}

API ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank,
                                        ncclConfig_t *config) {
    if (size > RANKS)
        return ncclInvalidArgument;
    int file = open(id.internal, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(struct meeting)))
        return ncclSystemError;
    struct ncclComm *c = calloc(1, sizeof *c);
    *c = (struct ncclComm){.size = size, .rank = rank, .lock = PTHREAD_MUTEX_INITIALIZER};
    c->meeting = mmap(NULL, sizeof(struct meeting), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (c->meeting == MAP_FAILED)
        return ncclSystemError;
    __sync_fetch_and_add(&c->meeting->joined, 1);
    while (c->meeting->joined < size)
        usleep(100);
    unlink(id.internal);
    pthread_t thread;
    pthread_create(&thread, NULL, work, c);
    dryrun_log("nccl", "init", size, rank, 0, 0);
    *comm = c;
    return ncclSuccess;
}

API ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(comm, size, id, rank, NULL);
}

API ncclResult_t ncclCommAbort(ncclComm_t c) {
    dryrun_log("nccl", "abort", 0, 0, 0, 0);
    c->aborted = 1;
    return ncclSuccess;
}

API ncclResult_t ncclCommCount(const ncclComm_t c, int *size) {
    *size = c->size;
    return ncclSuccess;
}

API ncclResult_t ncclCommUserRank(const ncclComm_t c, int *rank) {
    *rank = c->rank;
    return ncclSuccess;
}

API ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *error) {
    *error = ncclSuccess;
    return ncclSuccess;
}
