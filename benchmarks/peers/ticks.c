/* In a guest: owns so many MiB of noise in pages of which no two are the same, and then prints a
 * line every millisecond. The first says how many bytes of it are there.
 *
 * usage: ticks MIB
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MIB 1048576
#define PAGE 4096
/* Farther apart than a frame reaches, so that nothing of a block is found again within one. */
#define BLOCK (4 * MIB)

static uint64_t block[BLOCK / 8];

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  size_t size = strtoul(argv[1], NULL, 10) * MIB;
  uint64_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 1;
  uint64_t state = 88172645463325252ULL;
  for (size_t at = 0; at < BLOCK / 8; at++) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    block[at] = state;
  }
  for (size_t at = 0; at < size; at += MIB) {
    memcpy((char *)memory + at, (char *)block + at % BLOCK, MIB);
    for (size_t page = at; page < at + MIB; page += PAGE) memory[page / 8] = page + 1;
  }
  printf("%zu\n", size);
  fflush(stdout);
  struct timespec next;
  clock_gettime(CLOCK_MONOTONIC, &next);
  for (;;) {
    next.tv_nsec += 1000000;
    if (next.tv_nsec >= 1000000000) {
      next.tv_nsec -= 1000000000;
      next.tv_sec++;
    }
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
    if (write(1, ".\n", 2) != 2) return 1;
  }
}
