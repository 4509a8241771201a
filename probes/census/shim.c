// What this process launches, as CUPTI's callbacks tell it: kernel launches with their attributes,
// functions with the module they came from, and the cubins that were loaded. Nothing is decided
// here: events go into arrays, in order, and Python reads them. Compiled on the node by shim.py.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cupti_callbacks.h>
#include <cupti_driver_cbid.h>
#include <cupti_runtime_cbid.h>

// CUPTI hands over an API call's arguments as a struct of them, in order.
typedef struct {
  CUfunction f;
  unsigned gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  CUstream hStream;
  void **kernelParams, **extra;
} cuLaunchKernel_params;
typedef struct {
  const CUlaunchConfig *config;
  CUfunction f;
  void **kernelParams, **extra;
} cuLaunchKernelEx_params;
typedef struct {
  CUfunction f;
  unsigned gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  CUstream hStream;
  void **kernelParams;
} cuLaunchCooperativeKernel_params;
typedef struct {
  const void *func;
  dim3 gridDim, blockDim;
  void **args;
  size_t sharedMem;
  cudaStream_t stream;
} cudaLaunchKernel_params;
typedef struct {
  const cudaLaunchConfig_t *config;
  const void *func;
  void **args;
} cudaLaunchKernelExC_params;
typedef struct {  // of every call that loads a module or a library
  void **handle;
  const void *code;  // an image in memory, or the name of a file
} load_params;
typedef struct {
  CUfunction *hfunc;
  CUmodule hmod;
  const char *name;
} cuModuleGetFunction_params;
typedef struct {
  CUkernel *pKernel;
  CUlibrary library;
  const char *name;
} cuLibraryGetKernel_params;
typedef struct {
  CUmodule *pMod;
  CUlibrary library;
} cuLibraryGetModule_params;
typedef struct {
  CUfunction *pFunc;
  CUkernel kernel;
} cuKernelGetFunction_params;

enum { MOST_LAUNCHES = 1 << 15, MOST_FUNCTIONS = 1 << 16, MOST_BLOBS = 1 << 14, MOST_KERNELS = 1 << 12 };
enum { MOST_NAME = 16384, MOST_PARAMETERS = 128, MOST_DEPTH = 8 };
enum { VIA_DRIVER = 1, VIA_RUNTIME = 2, VIA_BOTH = 3 };
enum { PDL = 1, COOPERATIVE = 2, CLUSTER = 4, EVENT = 8 };
enum { FROM_API = 1, FROM_RESOURCE = 2 };

typedef struct {
  uint64_t seq, function, stream;
  uint64_t arguments;  // a hash of their bytes; 0 where their sizes are not known
  uint32_t grid[3], block[3], cluster[3];
  uint32_t shared, via, flags, other;
  int32_t result;
  const char *name;
} Launch;

typedef struct {
  uint64_t seq, handle, owner;  // owner: the module or library it was taken from
  uint32_t kind;                // 1 CUfunction, 2 CUkernel, 3 the module of a library
  int32_t parameters;           // how many; -1 unknown, -2 not asked yet
  uint32_t *sizes;
  const char *name;
} Function;

typedef struct {
  uint64_t seq, owner, size;
  uint32_t source;
  uint32_t loader;  // the thread that is loading it, until its owner is known
  int32_t loads;    // 1 where `owner` was loaded just then: earlier events of that handle are void
  void *data;
} Blob;

typedef struct {
  uint64_t launches, functions, blobs, graphs;
  uint64_t lost_launches, lost_functions, lost_blobs;
  uint64_t kernels;          // whose parameters' sizes were told
  uint64_t driver, runtime;  // launches each of the two interfaces told of
} Counts;

typedef struct {
  uint64_t generation;
  int driver_depth, runtime_depth;
  int64_t launch;       // index of the driver launch in progress, -1 none
  int seen;             // driver launches inside the runtime call in progress
  uint64_t loading;     // module or library whose code is being loaded
  int in_load;          // inside a load that has no handle yet
  int in_load_known;    // its image was a cubin, and will be copied
  uint64_t first_blob;  // blobs from here on may belong to the load in progress
  uint32_t id;
} Thread;

static Launch *launches;
static Function *functions;
static Function *kernels;  // by name, with sizes that were told
static Blob *blobs;
static Counts counts;
static uint64_t sequence, generation, blob_bytes, most_blob_bytes;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread Thread mine;

static CUpti_SubscriberHandle subscriber;
static int subscribed, watching;
static uint32_t threads;
static void *cupti;
static CUptiResult (*p_subscribe)(CUpti_SubscriberHandle *, CUpti_CallbackFunc, void *);
static CUptiResult (*p_unsubscribe)(CUpti_SubscriberHandle);
static CUptiResult (*p_enable)(uint32_t, CUpti_SubscriberHandle, CUpti_CallbackDomain,
                               CUpti_CallbackId);
static CUptiResult (*p_text)(CUptiResult, const char **);
static CUptiResult (*p_finalize)(void);
typedef CUresult (*ParamInfo)(void *, size_t, size_t *, size_t *);
static ParamInfo p_function_param, p_kernel_param;

static Thread *thread(void) {
  if (mine.generation != generation) {
    memset(&mine, 0, sizeof mine);
    mine.generation = generation;
    mine.launch = -1;
    mine.id = __atomic_add_fetch(&threads, 1, __ATOMIC_RELAXED);
  }
  return &mine;
}

static char *copied(const char *text) {
  return text ? strndup(text, MOST_NAME) : NULL;
}

static uint64_t fnv(uint64_t hash, const void *data, size_t size) {
  const unsigned char *bytes = data;
  for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001b3ull;
  return hash;
}

// Called with the lock held. The latest event of a handle counts: handles are used again.
static Function *known(uint64_t handle) {
  for (uint64_t i = counts.functions; i-- > 0;)
    if (functions[i].handle == handle && functions[i].kind != 3) return &functions[i];
  return NULL;
}

static void add_function(uint64_t handle, uint64_t owner, uint32_t kind, const char *name) {
  if (counts.functions == MOST_FUNCTIONS) {
    counts.lost_functions++;
    return;
  }
  functions[counts.functions++] =
      (Function){sequence++, handle, owner, kind, -2, NULL, copied(name)};
}

static void add_blob(const void *data, uint64_t size, uint64_t owner, uint32_t source, int loads,
                     uint32_t loader) {
  void *copy = NULL;
  if (data && size) {
    if (counts.blobs < MOST_BLOBS && blob_bytes + size <= most_blob_bytes) copy = malloc(size);
    if (!copy) counts.lost_blobs++;
  }
  if (counts.blobs == MOST_BLOBS || (!copy && !loads)) return;
  if (copy) {
    memcpy(copy, data, size);
    blob_bytes += size;
  } else {
    size = 0;
  }
  blobs[counts.blobs++] = (Blob){sequence++, owner, size, source, loader, loads, copy};
}

// The size of a cubin in memory, from its ELF header; 0 for anything else.
static uint64_t cubin_size(const void *image) {
  const unsigned char *bytes = image;
  if (!bytes || memcmp(bytes, "\177ELF\2\1", 6)) return 0;
  uint64_t programs, sections;
  uint16_t sizes[4];
  memcpy(&programs, bytes + 32, 8);
  memcpy(&sections, bytes + 40, 8);
  memcpy(sizes, bytes + 54, 8);
  uint64_t end = 64, one = programs + (uint64_t)sizes[0] * sizes[1];
  uint64_t two = sections + (uint64_t)sizes[2] * sizes[3];
  if (one > end) end = one;
  if (two > end) end = two;
  // A section may come after the table of sections.
  for (uint16_t i = 0; sections && sizes[2] >= 64 && i < sizes[3]; i++) {
    const unsigned char *header = bytes + sections + (uint64_t)i * sizes[2];
    uint32_t kind;
    uint64_t offset, size;
    memcpy(&kind, header + 4, 4);
    memcpy(&offset, header + 24, 8);
    memcpy(&size, header + 32, 8);
    if (kind != 8 && offset + size > end) end = offset + size;
  }
  return end;
}

static void add_file(const char *path, uint64_t owner) {
  FILE *file = path ? fopen(path, "rb") : NULL;
  void *data = NULL;
  long size = 0;
  if (file && !fseek(file, 0, SEEK_END) && (size = ftell(file)) > 64 &&
      (uint64_t)size <= most_blob_bytes && (data = malloc(size))) {
    rewind(file);
    if (fread(data, 1, size, file) != (size_t)size || memcmp(data, "\177ELF", 4)) size = 0;
  } else {
    size = 0;
  }
  add_blob(size ? data : NULL, size, owner, FROM_API, 1, 0);
  free(data);
  if (file) fclose(file);
}

// Asks the driver, so never with the lock held: it may call back.
static void sizes_of(Function *function) {
  ParamInfo ask = function->kind == 1 ? p_function_param : p_kernel_param;
  uint32_t found[MOST_PARAMETERS];
  int count = ask ? 0 : -1;
  while (count >= 0) {
    size_t offset, size;
    CUresult result = ask((void *)function->handle, count, &offset, &size);
    if (result == CUDA_ERROR_INVALID_VALUE) break;  // there are no more
    found[count] = (uint32_t)size;
    count = result == CUDA_SUCCESS && count + 1 < MOST_PARAMETERS ? count + 1 : -1;
  }
  uint32_t *sizes = count >= 0 ? malloc(sizeof *sizes * (count + 1)) : NULL;
  if (sizes) memcpy(sizes, found, sizeof *sizes * count);
  pthread_mutex_lock(&lock);
  if (function->parameters == -2) {
    function->parameters = sizes ? count : -1;
    function->sizes = sizes;
    sizes = NULL;
  }
  pthread_mutex_unlock(&lock);
  free(sizes);
}

// Sizes that were read from a cubin, for functions whose handle says nothing.
static Function *named(const char *name) {
  for (uint64_t i = counts.kernels; name && i-- > 0;)
    if (!strcmp(kernels[i].name, name)) return &kernels[i];
  return NULL;
}

static uint64_t hashed(uint64_t handle, const char *name, void **parameters, void **extra) {
  uint64_t hash = 0xcbf29ce484222325ull;
  if (parameters) {
    pthread_mutex_lock(&lock);
    Function *function = known(handle);  // its place never changes
    pthread_mutex_unlock(&lock);
    if (function && function->parameters == -2) sizes_of(function);
    if (!function || function->parameters < 0) {
      pthread_mutex_lock(&lock);
      function = named(name);
      pthread_mutex_unlock(&lock);
    }
    if (!function) return 0;
    for (int i = 0; i < function->parameters; i++)
      hash = fnv(hash, parameters[i], function->sizes[i]);
  } else if (extra) {
    const void *buffer = NULL;
    size_t size = 0;
    for (int i = 0; i < 4 && extra[i] != CU_LAUNCH_PARAM_END; i += 2) {
      if (extra[i] == CU_LAUNCH_PARAM_BUFFER_POINTER) buffer = extra[i + 1];
      if (extra[i] == CU_LAUNCH_PARAM_BUFFER_SIZE) size = *(size_t *)extra[i + 1];
    }
    if (!buffer) return 0;
    hash = fnv(hash, buffer, size);
  }
  return hash ? hash : 1;
}

static void attributes(Launch *launch, const CUlaunchAttribute *given, unsigned count) {
  for (unsigned i = 0; given && i < count; i++) {
    const CUlaunchAttributeValue *value = &given[i].value;
    switch ((int)given[i].id) {
      case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
        if (value->programmaticStreamSerializationAllowed) launch->flags |= PDL;
        break;
      case CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
        if (value->cooperative) launch->flags |= COOPERATIVE;
        break;
      case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
        launch->flags |= CLUSTER;
        launch->cluster[0] = value->clusterDim.x;
        launch->cluster[1] = value->clusterDim.y;
        launch->cluster[2] = value->clusterDim.z;
        break;
      case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_EVENT:
        launch->flags |= EVENT;
        break;
      default:
        if ((unsigned)given[i].id < 32) launch->other |= 1u << given[i].id;
    }
  }
}

// Called with the lock held; the index, or -1 where there is no room.
static int64_t add_launch(Launch launch, const char *name) {
  if (counts.launches == MOST_LAUNCHES) {
    counts.lost_launches++;
    return -1;
  }
  launch.seq = sequence++;
  if (!name) {
    Function *function = known(launch.function);
    name = function ? function->name : NULL;
  }
  launch.name = copied(name);
  launches[counts.launches] = launch;
  return (int64_t)counts.launches++;
}

static Launch plain(uint64_t function, const unsigned *dims, unsigned shared, void *stream) {
  Launch launch = {.function = function, .stream = (uint64_t)stream, .shared = shared};
  memcpy(launch.grid, dims, sizeof launch.grid);
  memcpy(launch.block, dims + 3, sizeof launch.block);
  return launch;
}

static void driver_launch(Thread *t, CUpti_CallbackId id, const CUpti_CallbackData *data) {
  Launch launch;
  void **parameters = NULL, **extra = NULL;
  if (id == CUPTI_DRIVER_TRACE_CBID_cuLaunchKernelEx ||
      id == CUPTI_DRIVER_TRACE_CBID_cuLaunchKernelEx_ptsz) {
    const cuLaunchKernelEx_params *p = data->functionParams;
    const CUlaunchConfig *c = p->config;
    if (!c) return;
    unsigned dims[6] = {c->gridDimX,  c->gridDimY,  c->gridDimZ,
                        c->blockDimX, c->blockDimY, c->blockDimZ};
    launch = plain((uint64_t)p->f, dims, c->sharedMemBytes, c->hStream);
    attributes(&launch, c->attrs, c->numAttrs);
    parameters = p->kernelParams, extra = p->extra;
  } else if (id == CUPTI_DRIVER_TRACE_CBID_cuLaunchCooperativeKernel ||
             id == CUPTI_DRIVER_TRACE_CBID_cuLaunchCooperativeKernel_ptsz) {
    const cuLaunchCooperativeKernel_params *p = data->functionParams;
    launch = plain((uint64_t)p->f, &p->gridDimX, p->sharedMemBytes, p->hStream);
    launch.flags |= COOPERATIVE;
    parameters = p->kernelParams;
  } else {
    const cuLaunchKernel_params *p = data->functionParams;
    launch = plain((uint64_t)p->f, &p->gridDimX, p->sharedMemBytes, p->hStream);
    parameters = p->kernelParams, extra = p->extra;
  }
  launch.via = t->runtime_depth > 0 ? VIA_BOTH : VIA_DRIVER;
  launch.arguments = hashed(launch.function, data->symbolName, parameters, extra);
  pthread_mutex_lock(&lock);
  t->launch = add_launch(launch, data->symbolName);
  counts.driver++;
  pthread_mutex_unlock(&lock);
  t->seen++;
  t->loading = launch.function;
}

static void runtime_launch(CUpti_CallbackId id, const CUpti_CallbackData *data, int result) {
  Launch launch;
  if (id == CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernelExC_v11060 ||
      id == CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernelExC_ptsz_v11060) {
    const cudaLaunchKernelExC_params *p = data->functionParams;
    const cudaLaunchConfig_t *c = p->config;
    if (!c) return;
    unsigned dims[6] = {c->gridDim.x,  c->gridDim.y,  c->gridDim.z,
                        c->blockDim.x, c->blockDim.y, c->blockDim.z};
    launch = plain((uint64_t)p->func, dims, (unsigned)c->dynamicSmemBytes, c->stream);
    // The runtime's attributes have the driver's numbers and layout.
    attributes(&launch, (const CUlaunchAttribute *)c->attrs, c->numAttrs);
  } else {
    const cudaLaunchKernel_params *p = data->functionParams;
    launch = plain((uint64_t)p->func, &p->gridDim.x, (unsigned)p->sharedMem, p->stream);
    if (id == CUPTI_RUNTIME_TRACE_CBID_cudaLaunchCooperativeKernel_v9000 ||
        id == CUPTI_RUNTIME_TRACE_CBID_cudaLaunchCooperativeKernel_ptsz_v9000)
      launch.flags |= COOPERATIVE;
  }
  launch.via = VIA_RUNTIME;
  launch.result = result;
  pthread_mutex_lock(&lock);
  add_launch(launch, data->symbolName);
  pthread_mutex_unlock(&lock);
}

static int from_file(CUpti_CallbackId id) {
  return id == CUPTI_DRIVER_TRACE_CBID_cuModuleLoad ||
         id == CUPTI_DRIVER_TRACE_CBID_cuLibraryLoadFromFile;
}

static void load_enter(Thread *t, CUpti_CallbackId id, const load_params *p) {
  t->in_load = 1;
  t->in_load_known = !from_file(id) && cubin_size(p->code) > 0;
  pthread_mutex_lock(&lock);
  t->first_blob = sequence;
  pthread_mutex_unlock(&lock);
}

static void load_exit(Thread *t, CUpti_CallbackId id, const load_params *p, int result) {
  t->in_load = t->in_load_known = 0;
  if (result != CUDA_SUCCESS || !p->handle) return;
  uint64_t handle = (uint64_t)*p->handle;
  pthread_mutex_lock(&lock);
  int had = 0;
  // What was loaded meanwhile, on this thread, is this module's code.
  for (uint64_t i = counts.blobs; i-- > 0 && blobs[i].seq >= t->first_blob;)
    if (blobs[i].loader == t->id) {
      blobs[i].owner = handle, blobs[i].loader = 0;
      blobs[i].loads = had = 1;
    }
  if (!had && from_file(id)) {
    add_file(p->code, handle);
  } else if (!had) {
    uint64_t size = cubin_size(p->code);
    add_blob(size ? p->code : NULL, size, handle, FROM_API, 1, 0);
  }
  pthread_mutex_unlock(&lock);
}

static void got(CUpti_CallbackId id, const void *p) {
  uint64_t handle, owner;
  uint32_t kind = 1;
  const char *name = NULL;
  pthread_mutex_lock(&lock);
  if (id == CUPTI_DRIVER_TRACE_CBID_cuModuleGetFunction) {
    const cuModuleGetFunction_params *g = p;
    handle = (uint64_t)*g->hfunc, owner = (uint64_t)g->hmod, name = g->name;
  } else if (id == CUPTI_DRIVER_TRACE_CBID_cuLibraryGetKernel) {
    const cuLibraryGetKernel_params *g = p;
    handle = (uint64_t)*g->pKernel, owner = (uint64_t)g->library, name = g->name, kind = 2;
  } else if (id == CUPTI_DRIVER_TRACE_CBID_cuLibraryGetModule) {
    const cuLibraryGetModule_params *g = p;
    handle = (uint64_t)*g->pMod, owner = (uint64_t)g->library, kind = 3;
  } else {
    const cuKernelGetFunction_params *g = p;
    Function *kernel = known((uint64_t)g->kernel);
    handle = (uint64_t)*g->pFunc, owner = kernel ? kernel->owner : 0;
    name = kernel ? kernel->name : NULL;
  }
  if (handle) add_function(handle, owner, kind, name);
  pthread_mutex_unlock(&lock);
}

static uint64_t asked_of(CUpti_CallbackId id, const void *p) {
  if (id == CUPTI_DRIVER_TRACE_CBID_cuModuleGetFunction)
    return (uint64_t)((const cuModuleGetFunction_params *)p)->hmod;
  if (id == CUPTI_DRIVER_TRACE_CBID_cuLibraryGetKernel)
    return (uint64_t)((const cuLibraryGetKernel_params *)p)->library;
  if (id == CUPTI_DRIVER_TRACE_CBID_cuLibraryGetModule)
    return (uint64_t)((const cuLibraryGetModule_params *)p)->library;
  return 0;
}

static const CUpti_CallbackId LAUNCHES[] = {
    CUPTI_DRIVER_TRACE_CBID_cuLaunchKernel,
    CUPTI_DRIVER_TRACE_CBID_cuLaunchKernel_ptsz,
    CUPTI_DRIVER_TRACE_CBID_cuLaunchKernelEx,
    CUPTI_DRIVER_TRACE_CBID_cuLaunchKernelEx_ptsz,
    CUPTI_DRIVER_TRACE_CBID_cuLaunchCooperativeKernel,
    CUPTI_DRIVER_TRACE_CBID_cuLaunchCooperativeKernel_ptsz,
};
static const CUpti_CallbackId GRAPHS[] = {
    CUPTI_DRIVER_TRACE_CBID_cuGraphLaunch,
    CUPTI_DRIVER_TRACE_CBID_cuGraphLaunch_ptsz,
};
static const CUpti_CallbackId LOADS[] = {
    CUPTI_DRIVER_TRACE_CBID_cuModuleLoad,          CUPTI_DRIVER_TRACE_CBID_cuModuleLoadData,
    CUPTI_DRIVER_TRACE_CBID_cuModuleLoadDataEx,    CUPTI_DRIVER_TRACE_CBID_cuModuleLoadFatBinary,
    CUPTI_DRIVER_TRACE_CBID_cuLibraryLoadData,     CUPTI_DRIVER_TRACE_CBID_cuLibraryLoadFromFile,
};
static const CUpti_CallbackId GETS[] = {
    CUPTI_DRIVER_TRACE_CBID_cuModuleGetFunction,
    CUPTI_DRIVER_TRACE_CBID_cuLibraryGetKernel,
    CUPTI_DRIVER_TRACE_CBID_cuLibraryGetModule,
    CUPTI_DRIVER_TRACE_CBID_cuKernelGetFunction,
};
// The last two are CUDA 13's, which headers of CUDA 12 do not name.
static const CUpti_CallbackId RUNTIME[] = {
    CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernel_v7000,
    CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernel_ptsz_v7000,
    CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernelExC_v11060,
    CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernelExC_ptsz_v11060,
    CUPTI_RUNTIME_TRACE_CBID_cudaLaunchCooperativeKernel_v9000,
    CUPTI_RUNTIME_TRACE_CBID_cudaLaunchCooperativeKernel_ptsz_v9000,
    505,
    506,
};
#define COUNT(array) (sizeof array / sizeof *array)

static int among(CUpti_CallbackId id, const CUpti_CallbackId *ids, size_t count) {
  for (size_t i = 0; i < count; i++)
    if (ids[i] == id) return 1;
  return 0;
}

static void on_driver(CUpti_CallbackId id, const CUpti_CallbackData *data) {
  Thread *t = thread();
  int entering = data->callbackSite == CUPTI_API_ENTER;
  // Calls that the driver makes into itself are part of the outermost.
  if (!entering && t->driver_depth > 0) t->driver_depth--;
  if (t->driver_depth == 0) {
    int result = entering || !data->functionReturnValue ? 0 : *(int *)data->functionReturnValue;
    if (among(id, LAUNCHES, COUNT(LAUNCHES))) {
      if (entering) {
        driver_launch(t, id, data);
      } else if (t->launch >= 0) {
        pthread_mutex_lock(&lock);
        if ((uint64_t)t->launch < counts.launches) launches[t->launch].result = result;
        pthread_mutex_unlock(&lock);
        t->launch = -1;
      }
      if (!entering) t->loading = 0;
    } else if (among(id, GRAPHS, COUNT(GRAPHS))) {
      if (entering) __atomic_add_fetch(&counts.graphs, 1, __ATOMIC_RELAXED);
    } else if (among(id, LOADS, COUNT(LOADS))) {
      if (entering) load_enter(t, id, data->functionParams);
      else load_exit(t, id, data->functionParams, result);
    } else if (among(id, GETS, COUNT(GETS))) {
      t->loading = entering ? asked_of(id, data->functionParams) : 0;
      if (!entering && result == CUDA_SUCCESS) got(id, data->functionParams);
    }
  }
  if (entering) t->driver_depth++;
}

static void on_runtime(CUpti_CallbackId id, const CUpti_CallbackData *data) {
  Thread *t = thread();
  if (data->callbackSite == CUPTI_API_ENTER) {
    if (t->runtime_depth++ == 0) t->seen = 0;
    return;
  }
  if (t->runtime_depth > 0) t->runtime_depth--;
  if (t->runtime_depth > 0) return;
  __atomic_add_fetch(&counts.runtime, 1, __ATOMIC_RELAXED);
  if (!t->seen)
    runtime_launch(id, data, data->functionReturnValue ? *(int *)data->functionReturnValue : 0);
}

static void CUPTIAPI callback(void *user, CUpti_CallbackDomain domain, CUpti_CallbackId id,
                              const void *raw) {
  (void)user;
  if (!raw) return;
  if (domain == CUPTI_CB_DOMAIN_DRIVER_API) on_driver(id, raw);
  if (domain == CUPTI_CB_DOMAIN_RUNTIME_API) on_runtime(id, raw);
  if (domain == CUPTI_CB_DOMAIN_RESOURCE && id == CUPTI_CBID_RESOURCE_MODULE_LOADED) {
    const CUpti_ModuleResourceData *module = ((const CUpti_ResourceData *)raw)->resourceDescriptor;
    Thread *t = thread();
    if (!module || (t->in_load && t->in_load_known)) return;
    pthread_mutex_lock(&lock);
    add_blob(module->pCubin, module->cubinSize, t->in_load ? 0 : t->loading, FROM_RESOURCE, 0,
             t->in_load ? t->id : 0);
    pthread_mutex_unlock(&lock);
  }
}

static char message[256];

static const char *failed(const char *what, CUptiResult code) {
  const char *text = NULL;
  if (p_text) p_text(code, &text);
  snprintf(message, sizeof message, "%s: %s (%d)", what, text ? text : "CUPTI error", (int)code);
  return message;
}

static CUptiResult enable(int on, CUpti_CallbackDomain domain, const CUpti_CallbackId *ids,
                          size_t count, int needed) {
  for (size_t i = 0; i < count; i++) {
    CUptiResult code = p_enable(on, subscriber, domain, ids[i]);
    if (code != CUPTI_SUCCESS && needed) return code;
  }
  return CUPTI_SUCCESS;
}

void census_close(void);

// Starts to record what is loaded. NULL, or why not in one sentence.
const char *census_open(const char *library, uint64_t most_bytes) {
  if (subscribed) return NULL;
  if (!cupti) {
    cupti = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!cupti) {
      snprintf(message, sizeof message, "%s", dlerror());
      return message;
    }
    *(void **)&p_subscribe = dlsym(cupti, "cuptiSubscribe");
    *(void **)&p_unsubscribe = dlsym(cupti, "cuptiUnsubscribe");
    *(void **)&p_enable = dlsym(cupti, "cuptiEnableCallback");
    *(void **)&p_text = dlsym(cupti, "cuptiGetResultString");
    *(void **)&p_finalize = dlsym(cupti, "cuptiFinalize");
    launches = calloc(MOST_LAUNCHES, sizeof *launches);
    functions = calloc(MOST_FUNCTIONS, sizeof *functions);
    kernels = calloc(MOST_KERNELS, sizeof *kernels);
    blobs = calloc(MOST_BLOBS, sizeof *blobs);
  }
  if (!p_subscribe || !p_unsubscribe || !p_enable) return "libcupti has no callback interface";
  if (!launches || !functions || !kernels || !blobs) return "no memory for the records";
  void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (!driver) return "there is no CUDA driver (libcuda.so.1)";
  *(void **)&p_function_param = dlsym(driver, "cuFuncGetParamInfo");
  *(void **)&p_kernel_param = dlsym(driver, "cuKernelGetParamInfo");
  most_blob_bytes = most_bytes;
  generation++;
  CUptiResult code = p_subscribe(&subscriber, callback, NULL);
  if (code != CUPTI_SUCCESS) return failed("cuptiSubscribe", code);
  subscribed = 1;
  code = enable(1, CUPTI_CB_DOMAIN_DRIVER_API, LOADS, COUNT(LOADS), 0);
  if (code == CUPTI_SUCCESS) code = enable(1, CUPTI_CB_DOMAIN_DRIVER_API, GETS, COUNT(GETS), 0);
  if (code == CUPTI_SUCCESS)
    code = p_enable(1, subscriber, CUPTI_CB_DOMAIN_RESOURCE, CUPTI_CBID_RESOURCE_MODULE_LOADED);
  if (code == CUPTI_SUCCESS) return NULL;
  const char *why = failed("cuptiEnableCallback", code);
  census_close();
  return why;
}

// Turns the recording of launches on or off. NULL, or why not.
const char *census_watch(int on) {
  if (!subscribed) return "CUPTI is not subscribed to";
  CUptiResult code = enable(on, CUPTI_CB_DOMAIN_DRIVER_API, LAUNCHES, COUNT(LAUNCHES), 1);
  if (code == CUPTI_SUCCESS)
    code = enable(on, CUPTI_CB_DOMAIN_DRIVER_API, GRAPHS, COUNT(GRAPHS), 0);
  if (code == CUPTI_SUCCESS)
    code = enable(on, CUPTI_CB_DOMAIN_RUNTIME_API, RUNTIME, COUNT(RUNTIME), 0);
  watching = on;
  return code == CUPTI_SUCCESS ? NULL : failed("cuptiEnableCallback", code);
}

// Ends the subscription; records stay.
void census_close(void) {
  if (!subscribed) return;
  if (watching) census_watch(0);
  p_unsubscribe(subscriber);
  subscribed = 0;
}

// Ends CUPTI itself, which keeps some bytes of every launch for as long as it lives, subscribed to
// or not. Records stay, and it may be opened again. Only while the device is idle.
void census_finalize(void) {
  census_close();
  if (p_finalize) p_finalize();
}

int census_is_open(void) { return subscribed; }

Counts census_counts(void) {
  pthread_mutex_lock(&lock);
  Counts now = counts;
  pthread_mutex_unlock(&lock);
  return now;
}

Launch census_launch(uint64_t index) { return launches[index]; }
Function census_function(uint64_t index) { return functions[index]; }
Blob census_blob(uint64_t index) { return blobs[index]; }

// Gives the memory of a blob back once it was read; its place in the order stays.
void census_free_blob(uint64_t index) {
  pthread_mutex_lock(&lock);
  if (index < counts.blobs && blobs[index].data) {
    blob_bytes -= blobs[index].size;
    free(blobs[index].data);
    blobs[index].data = NULL;
  }
  pthread_mutex_unlock(&lock);
}

// The sizes of a kernel's parameters, so that its arguments can be hashed from now on; 0 if full.
int census_sizes(const char *name, int count, const uint32_t *sizes) {
  pthread_mutex_lock(&lock);
  int room = kernels && counts.kernels < MOST_KERNELS && !named(name);
  if (room) {
    uint32_t *copy = malloc(sizeof *copy * (count + 1));
    char *text = copied(name);
    room = copy && text;
    if (room) {
      memcpy(copy, sizes, sizeof *copy * count);
      kernels[counts.kernels++] = (Function){0, 0, 0, 0, count, copy, text};
    }
  }
  pthread_mutex_unlock(&lock);
  return room;
}

// Forgets launches; functions and code stay, since later launches need them.
void census_clear(void) {
  pthread_mutex_lock(&lock);
  for (uint64_t i = 0; i < counts.launches; i++) free((void *)launches[i].name);
  counts.launches = counts.graphs = counts.lost_launches = 0;
  counts.driver = counts.runtime = 0;
  pthread_mutex_unlock(&lock);
}
