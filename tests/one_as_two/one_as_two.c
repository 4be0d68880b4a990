/* One CUDA device seen as two, for tests of models on several: ordinal 1 is device 0 once more.

   cc -shared -fPIC -o /tmp/one_as_two.so tests/one_as_two/one_as_two.c -ldl -lpthread
   LD_PRELOAD=/tmp/one_as_two.so PYTHONPATH=tests/one_as_two python -m pytest -p one_as_two -m gpu \
       tests/test_gpu.py -k "second_device or split"

   Stands between torch and CUDA's runtime (and the few calls of the driver that take an ordinal). What CUDA forbids
   between devices is refused here, too: an event recorded on another device's stream, a kernel or graph launched on
   one, time taken between events of two devices. Refusals are noted in /tmp/one_as_two.log. Both devices share one
   context, and so one memory and one default stream. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Status;
typedef void *Handle;
typedef struct {
  unsigned x, y, z;
} Size;

enum { DEVICES = 2, INVALID_DEVICE = 101, INVALID_HANDLE = 400, DEVICE_TO_DEVICE = 3 };
#define KNOWN(device) ((device) >= 0 && (device) < DEVICES)
#define REAL(name) ((__typeof__(&name))real(#name))

static __thread int current = 0;

/* -- the functions that this stands in front of; torch finds some by dlsym, so that is one of them */

static void *find(void *library, const char *name) {
  static void *(*dlsym_of_libc)(void *, const char *);
  if (!dlsym_of_libc) dlsym_of_libc = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
  return dlsym_of_libc(library, name);
}

static void note(const char *what, const char *which) {
  FILE *log = fopen("/tmp/one_as_two.log", "a");
  if (!log) return;
  fprintf(log, "%s %s\n", what, which);
  fclose(log);
}

static void *real(const char *name) {
  int of_runtime = strncmp(name, "cuda", 4) == 0;
  void *library = of_runtime ? dlopen("libcudart.so.13", RTLD_LAZY | RTLD_NOLOAD) : dlopen("libcuda.so.1", RTLD_LAZY);
  void *found = find(library ? library : RTLD_NEXT, name);
  if (!found) {
    note("not found:", name);
    abort();
  }
  return found;
}

/* -- whose streams and events are */

enum { PLACES = 65536 };
static struct {
  Handle key;
  int device;
} owners[PLACES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void own(Handle key, int device) {
  pthread_mutex_lock(&lock);
  size_t place = ((size_t)key >> 4) % PLACES;
  for (size_t tried = 0; tried < PLACES; tried++, place = (place + 1) % PLACES)
    if (!owners[place].key || owners[place].key == key) {
      owners[place].key = key;
      owners[place].device = device;
      break;
    }
  pthread_mutex_unlock(&lock);
}

/* -1 of what is not known */
static int owner(Handle key) {
  int found = -1;
  pthread_mutex_lock(&lock);
  size_t place = ((size_t)key >> 4) % PLACES;
  for (size_t tried = 0; tried < PLACES && owners[place].key; tried++, place = (place + 1) % PLACES)
    if (owners[place].key == key) {
      found = owners[place].device;
      break;
    }
  pthread_mutex_unlock(&lock);
  return found;
}

/* default streams are small numbers, of the current device */
static int of_stream(Handle stream) { return (size_t)stream < 16 ? current : owner(stream); }

static int differ(int one, int other) { return one >= 0 && other >= 0 && one != other; }

static Status refuse(const char *what, int one, int other) {
  char devices[64];
  snprintf(devices, sizeof devices, "%d %d", one, other);
  note(what, devices);
  return INVALID_HANDLE;
}

/* -- devices */

Status cudaGetDeviceCount(int *count) {
  Status status = REAL(cudaGetDeviceCount)(count);
  if (!status) *count = DEVICES;
  return status;
}

Status cudaSetDevice(int device) {
  if (!KNOWN(device)) return INVALID_DEVICE;
  Status status = REAL(cudaSetDevice)(0);
  if (!status) current = device;
  return status;
}

Status cudaGetDevice(int *device) {
  Status status = REAL(cudaGetDevice)(device);
  if (!status) *device = current;
  return status;
}

Status cudaGetDeviceProperties(Handle properties, int device) {
  return KNOWN(device) ? REAL(cudaGetDeviceProperties)(properties, 0) : INVALID_DEVICE;
}

Status cudaDeviceGetAttribute(int *value, int attribute, int device) {
  return KNOWN(device) ? REAL(cudaDeviceGetAttribute)(value, attribute, 0) : INVALID_DEVICE;
}

Status cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = device != peer;
  return 0;
}

Status cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  (void)flags;
  return peer == current ? INVALID_DEVICE : 0;
}

Status cudaDeviceGetPCIBusId(char *id, int length, int device) {
  (void)device;
  return REAL(cudaDeviceGetPCIBusId)(id, length, 0);
}

Status cudaDeviceGetDefaultMemPool(Handle *pool, int device) {
  (void)device;
  return REAL(cudaDeviceGetDefaultMemPool)(pool, 0);
}

Status cudaDeviceGetGraphMemAttribute(int device, int attribute, Handle value) {
  (void)device;
  return REAL(cudaDeviceGetGraphMemAttribute)(0, attribute, value);
}

Status cudaDeviceSetGraphMemAttribute(int device, int attribute, Handle value) {
  (void)device;
  return REAL(cudaDeviceSetGraphMemAttribute)(0, attribute, value);
}

Status cudaKernelSetAttributeForDevice(Handle kernel, int attribute, int value, int device) {
  (void)device;
  return REAL(cudaKernelSetAttributeForDevice)(kernel, attribute, value, 0);
}

Status cudaMemcpyPeerAsync(Handle to, int device, const void *from, int peer, size_t bytes, Handle stream) {
  (void)device, (void)peer;
  Status (*copy)(Handle, const void *, size_t, int, Handle) = real("cudaMemcpyAsync");
  return copy(to, from, bytes, DEVICE_TO_DEVICE, stream);
}

/* -- streams and events */

Status cudaStreamCreate(Handle *stream) {
  Status status = REAL(cudaStreamCreate)(stream);
  if (!status) own(*stream, current);
  return status;
}

Status cudaStreamCreateWithFlags(Handle *stream, unsigned flags) {
  Status status = REAL(cudaStreamCreateWithFlags)(stream, flags);
  if (!status) own(*stream, current);
  return status;
}

Status cudaStreamCreateWithPriority(Handle *stream, unsigned flags, int priority) {
  Status status = REAL(cudaStreamCreateWithPriority)(stream, flags, priority);
  if (!status) own(*stream, current);
  return status;
}

Status cudaStreamDestroy(Handle stream) {
  own(stream, -1);
  return REAL(cudaStreamDestroy)(stream);
}

Status cudaStreamGetDevice(Handle stream, int *device) {
  int found = of_stream(stream);
  *device = found < 0 ? current : found;
  return 0;
}

Status cudaEventCreate(Handle *event) {
  Status status = REAL(cudaEventCreate)(event);
  if (!status) own(*event, current);
  return status;
}

Status cudaEventCreateWithFlags(Handle *event, unsigned flags) {
  Status status = REAL(cudaEventCreateWithFlags)(event, flags);
  if (!status) own(*event, current);
  return status;
}

Status cudaEventDestroy(Handle event) {
  own(event, -1);
  return REAL(cudaEventDestroy)(event);
}

Status cudaEventRecord(Handle event, Handle stream) {
  int one = owner(event), other = of_stream(stream);
  if (differ(one, other)) return refuse("an event recorded on another device's stream:", one, other);
  return REAL(cudaEventRecord)(event, stream);
}

Status cudaEventRecordWithFlags(Handle event, Handle stream, unsigned flags) {
  int one = owner(event), other = of_stream(stream);
  if (differ(one, other)) return refuse("an event recorded on another device's stream:", one, other);
  return REAL(cudaEventRecordWithFlags)(event, stream, flags);
}

Status cudaEventElapsedTime(float *ms, Handle begin, Handle end) {
  int one = owner(begin), other = owner(end);
  if (differ(one, other)) return refuse("time between two devices:", one, other);
  return REAL(cudaEventElapsedTime)(ms, begin, end);
}

/* -- launches */

Status cudaLaunchKernel(const void *kernel, Size grid, Size block, Handle *arguments, size_t shared, Handle stream) {
  int device = of_stream(stream);
  if (differ(device, current)) return refuse("a kernel on another device's stream:", device, current);
  return REAL(cudaLaunchKernel)(kernel, grid, block, arguments, shared, stream);
}

Status cudaGraphLaunch(Handle graph, Handle stream) {
  int device = of_stream(stream);
  if (differ(device, current)) return refuse("a graph on another device's stream:", device, current);
  return REAL(cudaGraphLaunch)(graph, stream);
}

Status cuLaunchKernel(Handle kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y,
                      unsigned z, unsigned shared, Handle stream, Handle *arguments, Handle *extra) {
  int device = of_stream(stream);
  if (differ(device, current)) return refuse("a kernel on another device's stream:", device, current);
  return REAL(cuLaunchKernel)(kernel, grid_x, grid_y, grid_z, x, y, z, shared, stream, arguments, extra);
}

/* -- the driver's, for Triton and for torch's look at contexts */

Status cuDeviceGet(int *device, int ordinal) { return KNOWN(ordinal) ? REAL(cuDeviceGet)(device, 0) : INVALID_DEVICE; }

Status cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  return REAL(cuDeviceGetAttribute)(value, attribute, 0);
}

Status cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  return KNOWN(device) ? REAL(cuDevicePrimaryCtxGetState)(0, flags, active) : INVALID_DEVICE;
}

Status cuDevicePrimaryCtxRetain(Handle *context, int device) {
  return KNOWN(device) ? REAL(cuDevicePrimaryCtxRetain)(context, 0) : INVALID_DEVICE;
}

void *dlsym(void *library, const char *name) {
  if (name && !strcmp(name, "cuDeviceGet")) return cuDeviceGet;
  if (name && !strcmp(name, "cuDeviceGetAttribute")) return cuDeviceGetAttribute;
  if (name && !strcmp(name, "cuDevicePrimaryCtxGetState")) return cuDevicePrimaryCtxGetState;
  if (name && !strcmp(name, "cuDevicePrimaryCtxRetain")) return cuDevicePrimaryCtxRetain;
  return find(library, name);
}
