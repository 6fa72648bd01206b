// A driver's management library that the tests make up: the functions of nvml.h that the benchmark calls, for one GPU.
// What it answers depends on FAKE_NVML: "no-driver", "no-gpu", "silent" (nothing but what every GPU tells), or unset.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct gpu *nvmlDevice_t;
typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9 };

static struct gpu {
    int here;
} gpu;

static int is(const char *mood) {
    const char *set = getenv("FAKE_NVML");
    return set && !strcmp(set, mood);
}

static int text(char *out, unsigned length, const char *value) {
    if (length <= strlen(value)) return INVALID_ARGUMENT;
    strcpy(out, value);
    return SUCCESS;
}

static int number(nvmlDevice_t device, unsigned *out, unsigned value) {
    if (device != &gpu) return INVALID_ARGUMENT;
    if (is("silent")) return NOT_SUPPORTED;
    *out = value;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    return code == DRIVER_NOT_LOADED ? "Driver Not Loaded" : code == NOT_FOUND ? "Not Found" : "Other Error";
}
int nvmlInit_v2(void) { return is("no-driver") ? DRIVER_NOT_LOADED : SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = !is("no-gpu");
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    if (index) return NOT_FOUND;
    *device = &gpu;
    return SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    if (strcmp(uuid, "GPU-0123")) return NOT_FOUND;
    *device = &gpu;
    return SUCCESS;
}
int nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length) {
    return device == &gpu ? text(name, length, "NVIDIA Abacus") : INVALID_ARGUMENT;
}
int nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor) {
    if (device != &gpu) return INVALID_ARGUMENT;
    const char *set = getenv("FAKE_CAPABILITY");
    return sscanf(set ? set : "8.9", "%d.%d", major, minor) == 2 ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    if (device != &gpu) return INVALID_ARGUMENT;
    // More than 32 bits hold.
    memory->total = 24000000000ull;
    memory->used = 5000000001ull;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}
int nvmlSystemGetDriverVersion(char *version, unsigned length) { return text(version, length, "580.01"); }
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = 13010;
    return SUCCESS;
}
int nvmlDeviceGetClockInfo(nvmlDevice_t device, int type, unsigned *mhz) {
    return type == 1 || type == 2 ? number(device, mhz, 1000u * (unsigned)type) : INVALID_ARGUMENT;
}
int nvmlDeviceGetTemperature(nvmlDevice_t device, int sensor, unsigned *celsius) {
    return sensor ? INVALID_ARGUMENT : number(device, celsius, 45);
}
int nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts) { return number(device, milliwatts, 61500); }
int nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned *milliwatts) {
    return number(device, milliwatts, 72000);
}
