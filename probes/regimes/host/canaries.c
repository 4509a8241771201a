/* An allocator for torch that puts a zone of known bytes before and behind every block it gives out.
 *
 * Memory comes from the CUDA driver, whose library is loaded already. Zones are written when a block
 * is given out, and read when it comes back or when `canaries_check` is called; both wait for the
 * device, so that whoever wrote there has done so.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#define ZONE 512
#define BYTE 0xC5

typedef unsigned long long address;

typedef struct block {
    address base;
    size_t size;
    struct block *next;
} block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static block *blocks = NULL;
static long long given = 0, damaged = 0, bytes = 0, nearest = -1, smallest = -1, refused = 0;

static int (*mem_alloc)(address *, size_t);
static int (*mem_free)(address);
static int (*mem_set)(address, unsigned char, size_t);
static int (*mem_read)(void *, address, size_t);
static int (*wait_all)(void);

static int ready(void) {
    if (wait_all) return 1;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (!driver) return 0;
    *(void **)&mem_alloc = dlsym(driver, "cuMemAlloc_v2");
    *(void **)&mem_free = dlsym(driver, "cuMemFree_v2");
    *(void **)&mem_set = dlsym(driver, "cuMemsetD8_v2");
    *(void **)&mem_read = dlsym(driver, "cuMemcpyDtoH_v2");
    *(void **)&wait_all = dlsym(driver, "cuCtxSynchronize");
    return mem_alloc && mem_free && mem_set && mem_read && wait_all;
}

/* Bytes of a zone that changed; `behind`: whether it lies behind its block. */
static void look(address zone, int behind, size_t size) {
    unsigned char held[ZONE];
    long long here = 0;
    if (mem_read(held, zone, ZONE)) return;
    for (int i = 0; i < ZONE; i++) {
        if (held[i] == BYTE) continue;
        long long far = behind ? i : ZONE - 1 - i;
        if (nearest < 0 || far < nearest) nearest = far;
        here++;
    }
    if (!here) return;
    damaged++;
    bytes += here;
    if (smallest < 0 || (long long)size < smallest) smallest = (long long)size;
    mem_set(zone, BYTE, ZONE);
}

static void examine(const block *b) {
    look(b->base, 0, b->size);
    look(b->base + ZONE + b->size, 1, b->size);
}

void *canaries_malloc(ssize_t size, int device, void *stream) {
    (void)device;
    (void)stream;
    if (size <= 0) return NULL;
    pthread_mutex_lock(&lock);
    void *found = NULL;
    address base = 0;
    if (ready() && !mem_alloc(&base, (size_t)size + 2 * ZONE)) {
        mem_set(base, BYTE, ZONE);
        mem_set(base + ZONE + (size_t)size, BYTE, ZONE);
        wait_all();
        block *b = malloc(sizeof *b);
        b->base = base;
        b->size = (size_t)size;
        b->next = blocks;
        blocks = b;
        given++;
        found = (void *)(uintptr_t)(base + ZONE);
    } else {
        refused++;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

void canaries_free(void *pointer, ssize_t size, int device, void *stream) {
    (void)size;
    (void)device;
    (void)stream;
    if (!pointer) return;
    pthread_mutex_lock(&lock);
    wait_all();
    for (block **at = &blocks; *at; at = &(*at)->next) {
        block *b = *at;
        if (b->base + ZONE != (address)(uintptr_t)pointer) continue;
        examine(b);
        mem_free(b->base);
        *at = b->next;
        free(b);
        break;
    }
    pthread_mutex_unlock(&lock);
}

/* Blocks given out, zones that changed, their bytes, how near to a block, the smallest such block,
   and how often there was no memory. */
void canaries_check(long long *found) {
    pthread_mutex_lock(&lock);
    if (ready()) {
        wait_all();
        for (block *b = blocks; b; b = b->next) examine(b);
    }
    found[0] = given;
    found[1] = damaged;
    found[2] = bytes;
    found[3] = nearest;
    found[4] = smallest;
    found[5] = refused;
    pthread_mutex_unlock(&lock);
}
