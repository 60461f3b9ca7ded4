/* Makes a process's writes to files short, or interrupts them, as the kernel may at any time.
 *
 * Preloaded into a daemon under test. Of each three writes to a regular file one is interrupted
 * (EINTR) and one takes only half of its bytes; both are counted in the file that SHORT_WRITES
 * names, so that a test can see that they happened. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static atomic_uint turn;
static atomic_ulong *counts; /* interrupted, short */

__attribute__((constructor)) static void map_counts(void) {
  const char *path = getenv("SHORT_WRITES");
  int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
  void *found = fd < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (fd >= 0) close(fd);
  unsetenv("SHORT_WRITES"); /* for this process alone: mke2fs, for one, gives up */
  counts = found == MAP_FAILED ? NULL : found;
}

static int is_file(int fd) {
  struct stat found;
  return counts && fstat(fd, &found) == 0 && S_ISREG(found.st_mode);
}

/* How many of `size` bytes this call may take; 0: it is interrupted. */
static size_t allowed(int fd, size_t size) {
  if (size < 2 || !is_file(fd)) return size;
  unsigned now = atomic_fetch_add(&turn, 1) % 3;
  if (now == 2) return size;
  atomic_fetch_add(&counts[now], 1);
  return now == 0 ? 0 : size / 2;
}

ssize_t write(int fd, const void *bytes, size_t size) {
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "write");
  size_t taken = allowed(fd, size);
  if (size && !taken) return errno = EINTR, -1;
  return real(fd, bytes, taken);
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t at) {
  static ssize_t (*real)(int, const void *, size_t, off64_t);
  if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
  size_t taken = allowed(fd, size);
  if (size && !taken) return errno = EINTR, -1;
  return real(fd, bytes, taken, at);
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t at) {
  return pwrite64(fd, bytes, size, at);
}
