// Loaded before libcudart: one H200 in the eyes of torch. No kernel runs, and device memory is untouched host memory.
// Every function of libcudart that torch's libraries import and that is not here is made by libraries.py: it succeeds.
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include "cuda_runtime_api.h"

#define MEMORY 150754820096ull
#define OK(name, ...) \
  cudaError_t CUDARTAPI name(__VA_ARGS__) { return cudaSuccess; }

// --- what would make the host wait for the device is counted -------------------------------------------------------
static long long waits = 0;
long long absent_gpu_waits(void) { return waits; }
#define WAITS(name, ...) \
  cudaError_t CUDARTAPI name(__VA_ARGS__) { ++waits; return cudaSuccess; }
WAITS(cudaDeviceSynchronize, void)
WAITS(cudaStreamSynchronize, cudaStream_t s)
WAITS(cudaEventSynchronize, cudaEvent_t e)

// --- the device ------------------------------------------------------------------------------------------------------
static __thread int current = 0;
static long handle = 0x1000;
#define HANDLE(type) ((type)(handle += 16))

cudaError_t CUDARTAPI cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
cudaError_t CUDARTAPI cudaGetDevice(int *d) { *d = current; return cudaSuccess; }
cudaError_t CUDARTAPI cudaSetDevice(int d) { current = d; return cudaSuccess; }
cudaError_t CUDARTAPI cudaGetLastError(void) { return cudaSuccess; }
cudaError_t CUDARTAPI cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t CUDARTAPI cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }

#undef cudaGetDeviceProperties
static cudaError_t properties(struct cudaDeviceProp *p) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200");
  p->major = 9;
  p->minor = 0;
  p->totalGlobalMem = MEMORY;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->totalConstMem = 65536;
  p->l2CacheSize = 62914560;
  p->memoryBusWidth = 6144;
  p->concurrentKernels = p->unifiedAddressing = p->cooperativeLaunch = 1;
  p->asyncEngineCount = 3;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) { return properties(p); }
cudaError_t CUDARTAPI cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int d) { return properties(p); }

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  switch (a) {
    case cudaDevAttrMultiProcessorCount: *v = 132; break;
    case cudaDevAttrComputeCapabilityMajor: *v = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = 232448; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    default: *v = 0;
  }
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaMemGetInfo(size_t *f, size_t *t) { *f = *t = MEMORY; return cudaSuccess; }

// --- streams and events ----------------------------------------------------------------------------------------------
cudaError_t CUDARTAPI cudaDeviceGetStreamPriorityRange(int *lo, int *hi) { *lo = 0; *hi = -5; return cudaSuccess; }
cudaError_t CUDARTAPI cudaStreamCreate(cudaStream_t *s) { *s = HANDLE(cudaStream_t); return cudaSuccess; }
cudaError_t CUDARTAPI cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { return cudaStreamCreate(s); }
cudaError_t CUDARTAPI cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { return cudaStreamCreate(s); }
cudaError_t CUDARTAPI cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return cudaSuccess; }
cudaError_t CUDARTAPI cudaEventCreate(cudaEvent_t *e) { *e = HANDLE(cudaEvent_t); return cudaSuccess; }
cudaError_t CUDARTAPI cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { return cudaEventCreate(e); }
cudaError_t CUDARTAPI cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return cudaSuccess; }
cudaError_t CUDARTAPI cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) {
  *c = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t CUDARTAPI cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *i,
    cudaGraph_t *g, const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) {
  *c = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
#else
#undef cudaStreamGetCaptureInfo
cudaError_t CUDARTAPI cudaStreamGetCaptureInfo_v2(cudaStream_t s, enum cudaStreamCaptureStatus *c,
    unsigned long long *i, cudaGraph_t *g, const cudaGraphNode_t **d, size_t *n) {
  *c = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
#endif
OK(cudaStreamQuery, cudaStream_t s)
OK(cudaEventQuery, cudaEvent_t e)
OK(cudaEventDestroy, cudaEvent_t e)

// --- memory: address space of the host, for the little that Inductor allocates itself to trace its patterns ------------
cudaError_t CUDARTAPI cudaMalloc(void **p, size_t n) {
  *p = mmap(NULL, n ? n : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return *p == MAP_FAILED ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t CUDARTAPI cudaHostAlloc(void **p, size_t n, unsigned f) { return cudaMalloc(p, n); }
cudaError_t CUDARTAPI cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) {
  ++waits;
  memmove(d, s, n);
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t st) {
  memmove(d, s, n);
  return cudaSuccess;
}
OK(cudaFree, void *p)

static int nothing(void) { return 0; }
cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version,
    unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
  *f = (void *)nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
