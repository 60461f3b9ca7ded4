/* In a guest: owns so many MiB of noise and, each time its clock is set (a resume), reads one byte
 * of each page in random order. Appends the microseconds that took to a file.
 *
 * usage: touch MIB FILE
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define JUMP_US 200000

static int64_t now_us(clockid_t clock) {
  struct timespec at;
  clock_gettime(clock, &at);
  return at.tv_sec * 1000000LL + at.tv_nsec / 1000;
}

static uint64_t state = 88172645463325252ULL;

static uint64_t noise(void) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

/* What one clock is ahead of the other. A guest that was held up between two looks would see a jump
 * that there was none of. */
static int64_t offset_us(void) {
  for (;;) {
    int64_t first = now_us(CLOCK_MONOTONIC);
    int64_t at = now_us(CLOCK_REALTIME);
    if (now_us(CLOCK_MONOTONIC) - first < JUMP_US / 10) return at - first;
  }
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  size_t pages = strtoul(argv[1], NULL, 10) * (1048576 / PAGE);
  uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  uint32_t *order = malloc(pages * sizeof *order);
  if (memory == MAP_FAILED || order == NULL) return 1;
  for (size_t at = 0; at < pages * PAGE / 8; at++) memory[at] = noise();
  for (size_t at = 0; at < pages; at++) order[at] = at;
  for (size_t at = pages - 1; at > 0; at--) {
    size_t other = noise() % (at + 1);
    uint32_t kept = order[at];
    order[at] = order[other];
    order[other] = kept;
  }
  FILE *file = fopen(argv[2], "w");
  if (file == NULL) return 1;
  setvbuf(file, NULL, _IOLBF, 0);
  fprintf(file, "ready\n");
  int64_t before = offset_us();
  for (;;) {
    usleep(1000);
    int64_t offset = offset_us();
    if (offset - before < JUMP_US) {
      if (offset < before) before = offset;
      continue;
    }
    int64_t began = now_us(CLOCK_MONOTONIC);
    uint64_t sum = 0;
    for (size_t at = 0; at < pages; at++) sum += memory[order[at] * (size_t)(PAGE / 8)];
    fprintf(file, "%lld %llu\n", (long long)(now_us(CLOCK_MONOTONIC) - began),
            (unsigned long long)sum);
    before = offset_us();
  }
}
