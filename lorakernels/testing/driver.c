/* A CUDA driver where there is no GPU. It runs nothing: it answers what Triton asks, refuses what a driver would refuse
 * of a module, a launch or a tensor map (limits of the CUDA driver API, its reference and the programming guide), counts,
 * and remembers each launch. `lorakernels.testing.driver` builds and reads it. */
#include "cuda.h"
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#undef cuDeviceGetAttribute

typedef struct {
  char kernel[96];
  unsigned grid[3], threads, shared, dependent, size;
  void *stream;
  unsigned char *params; /* of `size` bytes, one behind the other in the kernel's order */
} Launch;

typedef struct {
  char name[96];
  int registers, most_shared, num_params;
  unsigned short offsets[256], sizes[256];
} Function;

Launch *lk_launches;
char (*lk_refusals)[160];
long lk_num_launches, lk_num_refusals, lk_num_maps;
static int capability = 90, shared_per_block = 232448, processors = 132;
static const int default_shared = 49152, registers_per_block = 65536;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void lk_device(int new_capability, int new_shared_per_block, int new_processors) {
  capability = new_capability, shared_per_block = new_shared_per_block, processors = new_processors;
}

/* Room for one more at a power of two: the array doubles. */
static void *grown(void *array, long count, size_t size) {
  return count & (count - 1) ? array : realloc(array, size * (count ? 2 * count : 1));
}

static CUresult refuse(CUresult code, const char *format, ...) {
  va_list rest;
  pthread_mutex_lock(&lock);
  lk_refusals = grown(lk_refusals, lk_num_refusals, sizeof *lk_refusals);
  va_start(rest, format);
  vsnprintf(lk_refusals[lk_num_refusals++], sizeof *lk_refusals, format, rest);
  va_end(rest);
  pthread_mutex_unlock(&lock);
  return code;
}

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = lk_num_refusals ? lk_refusals[lk_num_refusals - 1] : "no error";
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)8, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)8, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS; /* memory of the host stands for the device's */
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (attribute >= CU_DEVICE_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_per_block; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = default_shared; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_per_block + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = processors; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = registers_per_block; break;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability % 10; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const Elf64_Ehdr *elf = image;
  if (memcmp(image, ELFMAG, SELFMAG)) return refuse(CUDA_ERROR_INVALID_IMAGE, "module: this is no cubin");
  if (elf->e_machine != 190) return refuse(CUDA_ERROR_INVALID_IMAGE, "module: an ELF file for machine %d, not for CUDA", elf->e_machine);
  int built_for = (elf->e_ident[EI_ABIVERSION] >= 8 ? elf->e_flags >> 8 : elf->e_flags) & 0xff;
  if (built_for / 10 != capability / 10 || built_for > capability)
    return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "module: a cubin for sm_%d, and the device is sm_%d", built_for, capability);
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

/* How many registers a thread of the module's kernel takes; 0 where the file does not say. */
static int registers_of(const char *info, size_t size) {
  for (size_t at = 0; at + 4 <= size;) {
    int has_payload = info[at] == 4, length = *(const unsigned short *)(info + at + 2);
    if (has_payload && info[at + 1] == 0x2f) return *(const int *)(info + at + 8); /* EIATTR_REGCOUNT: symbol, number */
    at += 4 + (has_payload ? length : 0);
  }
  return 0;
}

/* Where the kernel's parameters lie, and how long they are. */
static void params_of(Function *function, const char *info, size_t size) {
  for (size_t at = 0; at + 4 <= size;) {
    int has_payload = info[at] == 4, length = *(const unsigned short *)(info + at + 2);
    if (has_payload && info[at + 1] == 0x17) { /* EIATTR_KPARAM_INFO: index, ordinal, offset, and the size in 14 bits */
      unsigned short ordinal = *(const unsigned short *)(info + at + 8);
      if (ordinal < 256) {
        function->offsets[ordinal] = *(const unsigned short *)(info + at + 10);
        function->sizes[ordinal] = *(const unsigned *)(info + at + 12) >> 18;
        if (ordinal >= function->num_params) function->num_params = ordinal + 1;
      }
    }
    at += 4 + (has_payload ? length : 0);
  }
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  const char *image = (const char *)module;
  const Elf64_Ehdr *elf = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + elf->e_shoff);
  const char *names = image + sections[elf->e_shstrndx].sh_offset;
  Function *found = calloc(1, sizeof *found);
  int there = 0;
  for (int i = 0; i < elf->e_shnum; i++) {
    const char *section = names + sections[i].sh_name;
    there |= !strncmp(section, ".text.", 6) && !strcmp(section + 6, name);
    if (!strcmp(section, ".nv.info")) found->registers = registers_of(image + sections[i].sh_offset, sections[i].sh_size);
    if (!strncmp(section, ".nv.info.", 9) && !strcmp(section + 9, name))
      params_of(found, image + sections[i].sh_offset, sections[i].sh_size);
  }
  if (!there) return free(found), refuse(CUDA_ERROR_NOT_FOUND, "module: it has no kernel %s", name);
  snprintf(found->name, sizeof found->name, "%s", name);
  found->most_shared = default_shared;
  *function = (CUfunction)found;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
         : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS              ? ((Function *)function)->registers
                                                                : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute >= CU_FUNC_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE; /* asked by way of trial, of newer drivers */
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value > shared_per_block)
    return refuse(CUDA_ERROR_INVALID_VALUE, "function: %d bytes of shared memory, and a block has %d", value, shared_per_block);
  ((Function *)function)->most_shared = value;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  return *clusters = 1, CUDA_SUCCESS;
}

static int bytes_of(CUtensorMapDataType type) {
  switch (type) {
  case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
  case CU_TENSOR_MAP_DATA_TYPE_UINT16: case CU_TENSOR_MAP_DATA_TYPE_FLOAT16: case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
  case CU_TENSOR_MAP_DATA_TYPE_INT64: case CU_TENSOR_MAP_DATA_TYPE_UINT64: case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
  default: return 4;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned inner = box[0] * bytes_of(type);
  unsigned span = swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : ~0u;
  __atomic_add_fetch(&lk_num_maps, 1, __ATOMIC_RELAXED);
  if (capability < 90) return refuse(CUDA_ERROR_NOT_SUPPORTED, "tensor map: sm_%d has none", capability);
  if (rank < 1 || rank > 5) return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: %u dimensions", rank);
  if ((cuuint64_t)address % 16) return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: address %p is no multiple of 16", address);
  for (unsigned i = 0; i < rank; i++) {
    if (!sizes[i] || sizes[i] > 1ull << 32) return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: a size of %llu", (unsigned long long)sizes[i]);
    if (!box[i] || box[i] > 256) return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: a box of %u, and 256 is the most", box[i]);
    if (!steps[i] || steps[i] > 8) return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: an element stride of %u", steps[i]);
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40))
      return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: a stride of %llu bytes, no multiple of 16", (unsigned long long)strides[i]);
  }
  if (inner % 16) return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: rows of a box are %u bytes, no multiple of 16", inner);
  if (interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && inner > span)
    return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: rows of a box are %u bytes, and the swizzle spans %u", inner, span);
  cuuint64_t *words = (cuuint64_t *)map; /* what was asked for: the driver's own form is not known */
  memset(map, 0, sizeof *map);
  words[0] = (cuuint64_t)address, words[1] = type + 16 * swizzle + 64 * fill;
  for (unsigned i = 0; i < rank; i++) words[2 + i] = sizes[i], words[7 + i] = i + 1 < rank ? strides[i] : 0;
  for (unsigned i = 0; i < rank && i < 4; i++) words[12 + i] = box[i];
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **params, void **extra) {
  const Function *function = (const Function *)handle;
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ, dependent = 0;
  for (unsigned i = 0; i < config->numAttrs; i++)
    dependent |= config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  if (!config->gridDimX || !config->gridDimY || !config->gridDimZ || config->gridDimX > 0x7fffffff ||
      config->gridDimY > 65535 || config->gridDimZ > 65535)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: a grid of %u × %u × %u", function->name, config->gridDimX, config->gridDimY, config->gridDimZ);
  if (!threads || threads > 1024) return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %u threads a block", function->name, threads);
  if ((int)config->sharedMemBytes > function->most_shared)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %u bytes of shared memory, over %d", function->name, config->sharedMemBytes, function->most_shared);
  /* Registers are given to a warp in lots of 256: 8 a thread. */
  if ((function->registers + 7) / 8 * 8 * threads > registers_per_block)
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%s: %d registers for each of %u threads", function->name, function->registers, threads);
  pthread_mutex_lock(&lock);
  lk_launches = grown(lk_launches, lk_num_launches, sizeof *lk_launches);
  Launch *launch = &lk_launches[lk_num_launches++];
  *launch = (Launch){.grid = {config->gridDimX, config->gridDimY, config->gridDimZ}, .threads = threads, .shared = config->sharedMemBytes, .dependent = dependent, .stream = config->hStream};
  memcpy(launch->kernel, function->name, sizeof launch->kernel);
  for (int i = 0; i < function->num_params; i++)
    if (function->offsets[i] + function->sizes[i] > launch->size) launch->size = function->offsets[i] + function->sizes[i];
  launch->params = calloc(launch->size, 1);
  for (int i = 0; params && i < function->num_params; i++)
    memcpy(launch->params + function->offsets[i], params[i], function->sizes[i]);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
