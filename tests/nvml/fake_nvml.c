/* A stand-in for libnvidia-ml.so.1: the part of NVML that localmesh asks, as nvidia-ml-py calls it.
 *
 * What it answers is read anew at each call from the file $FAKE_NVML_STATE, one GPU a line:
 *     UUID|NAME|TOTAL|USED|PID:BYTES,PID:BYTES
 * A total of 0 is "not supported", as on machines whose GPU shares the RAM; -1 is a GPU that was lost.
 * $FAKE_NVML_INIT, if set, is the return code of the initialisation (9: no driver).
 *
 * Build: cc -shared -fPIC -Wl,-soname,libnvidia-ml.so.1 -o libnvidia-ml.so.1 fake_nvml.c
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };
enum { MOST_GPUS = 8, MOST_PROCESSES = 16 };

typedef unsigned long long bytes;

struct gpu {
    char uuid[80];
    char name[80];
    long long total;
    bytes used;
    unsigned processes;
    unsigned pid[MOST_PROCESSES];
    bytes held[MOST_PROCESSES];
};

struct memory { bytes total, free, used; };
struct process { unsigned pid; bytes used; unsigned gpu_instance, compute_instance; };

static int initialised;
static struct gpu gpus[MOST_GPUS];

static int read_state(void) {
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[1024];
    int count = 0;

    if (!file)
        return 0;
    while (count < MOST_GPUS && fgets(line, sizeof line, file)) {
        struct gpu *gpu = &gpus[count];
        char holders[512] = "";
        memset(gpu, 0, sizeof *gpu);
        if (sscanf(line, "%79[^|]|%79[^|]|%lld|%llu|%511[^\n]", gpu->uuid, gpu->name, &gpu->total, &gpu->used, holders) < 4)
            continue;
        for (char *one = strtok(holders, ","); one && gpu->processes < MOST_PROCESSES; one = strtok(NULL, ","))
            if (sscanf(one, "%u:%llu", &gpu->pid[gpu->processes], &gpu->held[gpu->processes]) == 2)
                gpu->processes++;
        count++;
    }
    fclose(file);
    return count;
}

static struct gpu *gpu_of(void *handle) {
    long index = (long)handle - 1;
    return initialised && index >= 0 && index < read_state() ? &gpus[index] : NULL;
}

int nvmlInitWithFlags(unsigned flags) {
    const char *code = getenv("FAKE_NVML_INIT");
    (void)flags;
    if (code)
        return atoi(code);
    initialised = 1;
    return SUCCESS;
}

int nvmlShutdown(void) {
    initialised = 0;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    return code == NOT_SUPPORTED ? "Not Supported" : code == 9 ? "Driver Not Loaded" : "Some Error";
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    if (!initialised)
        return UNINITIALIZED;
    *count = (unsigned)read_state();
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)((long)index + 1);
    return gpu_of(*handle) ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
    struct gpu *gpu = gpu_of(handle);
    if (!gpu)
        return INVALID_ARGUMENT;
    snprintf(text, size, "%s", gpu->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    struct gpu *gpu = gpu_of(handle);
    if (!gpu)
        return INVALID_ARGUMENT;
    snprintf(text, size, "%s", gpu->name);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {
    struct gpu *gpu = gpu_of(handle);
    if (!gpu)
        return INVALID_ARGUMENT;
    if (gpu->total == 0)
        return NOT_SUPPORTED;
    if (gpu->total < 0)
        return GPU_IS_LOST;
    memory->total = (bytes)gpu->total;
    memory->used = gpu->used;
    memory->free = memory->total - gpu->used;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process *found) {
    struct gpu *gpu = gpu_of(handle);
    unsigned room = *count;
    if (!gpu)
        return INVALID_ARGUMENT;
    *count = gpu->processes;
    if (room < gpu->processes)
        return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < gpu->processes; i++)
        found[i] = (struct process){gpu->pid[i], gpu->held[i], ~0u, ~0u};
    return SUCCESS;
}
