// The trace: a file of tab-separated lines, opened by the tool (dryrun_open), or for whole commands
// by DRYRUN_TRACE=prefix, one file a process.
#include "dryrun.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static FILE *trace;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

API void dryrun_log(const char *kind, const char *name, long a, long b, long c, long d) {
    if (!trace)
        return;
    pthread_mutex_lock(&lock);
    fprintf(trace, "%s\t%s\t%ld\t%ld\t%ld\t%ld\n", kind, name, a, b, c, d);
    pthread_mutex_unlock(&lock);
}

// Writes to `path` from now on; nowhere for "".
API void dryrun_open(const char *path) {
    pthread_mutex_lock(&lock);
    if (trace)
        fclose(trace);
    trace = *path ? fopen(path, "w") : NULL;
    pthread_mutex_unlock(&lock);
}

// What follows belongs to this part of a step.
API void dryrun_mark(const char *part) { dryrun_log("mark", part, 0, 0, 0, 0); }

__attribute__((constructor)) static void begin(void) {
    const char *prefix = getenv("DRYRUN_TRACE");
    const char *rank = getenv("RANK");
    char path[512];
    if (!prefix || !*prefix)
        return;
    snprintf(path, sizeof path, "%s.%s.%d", prefix, rank ? rank : "0", getpid());
    dryrun_open(path);
}

// What every function does that no file here defines: nothing, and 0 (success). DRYRUN_VERBOSE=1
// names them.
API int dryrun_stub(const char *name, int *calls) {
    if (!(*calls)++ && getenv("DRYRUN_VERBOSE"))
        fprintf(stderr, "[dryrun] %s is a stub\n", name);
    return 0;
}
