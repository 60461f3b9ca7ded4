// The bare FUSE server that the pager's reads are measured against: it has all bytes mapped, and
// answers each READ with one writev straight from there. Nothing is looked up, verified or counted.
//
//   cc -O2 -pthread -o fuse_loop fuse_loop.c && ./fuse_loop FLAT_FILE DEVICE...
//
// Each DEVICE is the number of an open end of one FUSE connection; a thread serves each. There is
// one file, whatever it is called.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define READ_BYTES_MAX (1 << 20)
#define REQUEST_BYTES_MAX (READ_BYTES_MAX + 4096)
#define FOREVER_S (1ULL << 32)

static char *bytes;
static uint64_t size_bytes;

static void check(int right, const char *what) {
    if (!right) {
        perror(what);
        exit(1);
    }
}

static void reply(int device, uint64_t unique, int error, const void *data, size_t length) {
    struct fuse_out_header head = {.len = sizeof head + length, .error = -error, .unique = unique};
    struct iovec parts[2] = {{&head, sizeof head}, {(void *)data, length}};
    if (writev(device, parts, length ? 2 : 1) < 0 && errno != ENOENT)
        perror("reply");
}

static struct fuse_attr attributes_of(uint64_t node) {
    int root = node == FUSE_ROOT_ID;
    struct fuse_attr of = {.ino = node, .nlink = 1, .blksize = 4096};
    of.mode = root ? S_IFDIR | 0500 : S_IFREG | 0400;
    of.size = root ? 0 : size_bytes;
    return of;
}

static void greet(int device, uint64_t unique, const struct fuse_init_in *asked) {
    struct fuse_init_out answer = {.major = 7, .minor = 36, .max_readahead = READ_BYTES_MAX};
    answer.max_background = 64;
    answer.congestion_threshold = 48;
    answer.max_write = READ_BYTES_MAX;
    answer.time_gran = 1;
    answer.max_pages = READ_BYTES_MAX / 4096;
    answer.flags = asked->flags & (FUSE_ASYNC_READ | FUSE_MAX_PAGES | FUSE_PARALLEL_DIROPS);
    reply(device, unique, 0, &answer, sizeof answer);
}

static void read_bytes(int device, uint64_t unique, const struct fuse_read_in *asked) {
    uint64_t from = asked->offset < size_bytes ? asked->offset : size_bytes;
    uint64_t there = size_bytes - from;
    reply(device, unique, 0, bytes + from, asked->size < there ? asked->size : there);
}

static void answer(int device, const struct fuse_in_header *head) {
    const void *arguments = head + 1;
    struct fuse_entry_out entry = {.nodeid = 2, .attr_valid = FOREVER_S, .attr = attributes_of(2)};
    struct fuse_attr_out attributes = {.attr_valid = FOREVER_S};
    struct fuse_open_out opened = {.open_flags = FOPEN_KEEP_CACHE | FOPEN_NOFLUSH};
    switch (head->opcode) {
    case FUSE_INIT:
        return greet(device, head->unique, arguments);
    case FUSE_READ:
        return read_bytes(device, head->unique, arguments);
    case FUSE_LOOKUP:
        return reply(device, head->unique, 0, &entry, sizeof entry);
    case FUSE_GETATTR:
        attributes.attr = attributes_of(head->nodeid);
        return reply(device, head->unique, 0, &attributes, sizeof attributes);
    case FUSE_OPEN:
    case FUSE_OPENDIR:
        return reply(device, head->unique, 0, &opened, sizeof opened);
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        return;
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_FLUSH:
    case FUSE_ACCESS:
    case FUSE_DESTROY:
        return reply(device, head->unique, 0, NULL, 0);
    default:
        return reply(device, head->unique, ENOSYS, NULL, 0);
    }
}

static void *serve(void *of) {
    int device = (int)(intptr_t)of;
    char *request = malloc(REQUEST_BYTES_MAX);
    check(request != NULL, "malloc");
    for (;;) {
        ssize_t got = read(device, request, REQUEST_BYTES_MAX);
        if (got >= 0)
            answer(device, (void *)request);
        else if (errno == ENODEV)
            return NULL;
        else
            check(errno == EINTR || errno == EAGAIN || errno == ENOENT, "read");
    }
}

int main(int count, char **values) {
    if (count < 3) {
        fprintf(stderr, "usage: fuse_loop FLAT_FILE DEVICE...\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int file = open(values[1], O_RDONLY | O_CLOEXEC);
    check(file >= 0, values[1]);
    struct stat of;
    check(fstat(file, &of) == 0, "fstat");
    size_bytes = of.st_size;
    bytes = mmap(NULL, size_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    check(bytes != MAP_FAILED, "mmap");
    for (int at = 3; at < count; at++) {
        pthread_t thread;
        errno = pthread_create(&thread, NULL, serve, (void *)(intptr_t)atoi(values[at]));
        check(errno == 0, "pthread_create");
    }
    serve((void *)(intptr_t)atoi(values[2]));
    return 0;
}
