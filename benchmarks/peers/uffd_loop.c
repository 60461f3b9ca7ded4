// The bare loop that a userfaultfd server is measured against: one descriptor, poll, read, copy
// from memory that is there, and nothing else. A process of its own serves, as a pager does.
//
//   cc -O2 -o uffd_loop uffd_loop.c && ./uffd_loop BYTES_OF_A_FAULT BYTES
//
// Prints a line of JSON: microseconds that the first touch of each window takes (p50, p99), and how
// fast all of it was touched.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void check(int right, const char *what) {
    if (!right) {
        perror(what);
        exit(1);
    }
}

static double now_us(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static int by_size(const void *one, const void *other) {
    double difference = *(const double *)one - *(const double *)other;
    return (difference > 0) - (difference < 0);
}

static _Noreturn void serve(int uffd, char *memory, const char *source, size_t window) {
    struct uffd_msg messages[16];
    for (;;) {
        struct pollfd ready = {.fd = uffd, .events = POLLIN};
        poll(&ready, 1, -1);
        ssize_t bytes = read(uffd, messages, sizeof messages);
        if (bytes < 0)
            continue;
        for (size_t i = 0; i < bytes / sizeof *messages; i++) {
            size_t offset = messages[i].arg.pagefault.address - (uintptr_t)memory;
            offset -= offset % window;
            struct uffdio_copy copy = {.dst = (uintptr_t)memory + offset,
                                       .src = (uintptr_t)source + offset,
                                       .len = window};
            if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
                _exit(1);
        }
    }
}

int main(int count, char **arguments) {
    if (count != 3)
        return 2;
    size_t window = strtoul(arguments[1], 0, 10), size = strtoul(arguments[2], 0, 10);
    int both = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    // Begins where a window does, whatever the kernel chose.
    char *memory = mmap(0, size + window, both, flags, -1, 0);
    check(memory != MAP_FAILED, "mmap");
    memory += (window - (uintptr_t)memory % window) % window;
    madvise(memory, size, MADV_NOHUGEPAGE);
    char *source = malloc(size);
    memset(source, 7, size);
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};
    check(uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api), "userfaultfd");
    struct uffdio_register all = {.range = {(uintptr_t)memory, size},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
    check(!ioctl(uffd, UFFDIO_REGISTER, &all), "register");
    pid_t server = fork();
    if (!server) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        serve(uffd, memory, source, window);
    }
    double *took = malloc(size / window * sizeof *took);
    size_t windows = 0;
    double begin = now_us();
    for (size_t offset = 0; offset < size; offset += 4096) {
        double before = now_us();
        volatile char byte = memory[offset];
        double after = now_us();
        if (offset % window == 0)
            took[windows++] = after - before;
        if (byte != 7)
            return 3;
    }
    double all_us = now_us() - begin;
    kill(server, SIGKILL);
    waitpid(server, 0, 0);
    qsort(took, windows, sizeof *took, by_size);
    printf("{\"peer\":\"uffd_loop\",\"window_bytes\":%zu,\"faults\":%zu,\"p50_us\":%.2f,"
           "\"p99_us\":%.2f,\"mb_per_s\":%.0f}\n",
           window, windows, took[windows / 2], took[windows * 99 / 100], size / all_us);
    return 0;
}
