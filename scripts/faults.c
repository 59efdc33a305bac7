/* Makes a chosen file operation below a folder fail: LD_PRELOAD for scripts/faults.py. Counts opens for writing, writes,
   renames, links, new folders and syncs; the one of number `faults_at` fails, and in the mode `full` all after it too. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, FAIL, FULL, SHORT };
/* Shared with the processes that are forked from the first. */
static struct { char folder[PATH_MAX]; atomic_long count, at; atomic_int mode; } *all;

__attribute__((constructor)) static void share(void) {
    all = mmap(NULL, sizeof *all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) abort();
}
void faults_arm(const char *below, long where, int how) {
    strncpy(all->folder, below, PATH_MAX - 1);
    atomic_store(&all->count, 0);
    atomic_store(&all->at, where);
    atomic_store(&all->mode, how);
}
long faults_count(void) { return atomic_load(&all->count); }

static int below(const char *path) {
    return all && all->folder[0] && !strncmp(path, all->folder, strlen(all->folder));
}
static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}
/* 0: go on; 1: fail; 2: do half of it */
static int strike(void) {
    long k = atomic_fetch_add(&all->count, 1) + 1, where = atomic_load(&all->at);
    int how = atomic_load(&all->mode);
    if (how == OFF || where == 0) return 0;
    if (k == where) return how == SHORT ? 2 : 1;
    return k > where && how != FAIL;
}
static int failing(void) {
    errno = atomic_load(&all->mode) == FAIL ? EIO : ENOSPC;
    return -1;
}
#define REAL(name, type, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name, int, const char *, int, ...); \
        va_list args; \
        va_start(args, flags); \
        mode_t bits = va_arg(args, mode_t); \
        va_end(args); \
        if ((flags & (O_CREAT | O_TRUNC)) && below(path) && strike()) return failing(); \
        return real(path, flags, bits); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        REAL(name, int, int, const char *, int, ...); \
        va_list args; \
        va_start(args, flags); \
        mode_t bits = va_arg(args, mode_t); \
        va_end(args); \
        if ((flags & (O_CREAT | O_TRUNC)) && below(path) && strike()) return failing(); \
        return real(dir, path, flags, bits); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write, ssize_t, int, const void *, size_t);
    int how = n && below_fd(fd) ? strike() : 0;
    if (how == 1) return failing();
    return real(fd, data, how == 2 && n > 1 ? n / 2 : n);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t where) {
    REAL(pwrite, ssize_t, int, const void *, size_t, off_t);
    int how = n && below_fd(fd) ? strike() : 0;
    if (how == 1) return failing();
    return real(fd, data, how == 2 && n > 1 ? n / 2 : n, where);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t where) {
    REAL(pwrite64, ssize_t, int, const void *, size_t, off64_t);
    int how = n && below_fd(fd) ? strike() : 0;
    if (how == 1) return failing();
    return real(fd, data, how == 2 && n > 1 ? n / 2 : n, where);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev, ssize_t, int, const struct iovec *, int);
    int how = below_fd(fd) ? strike() : 0;
    if (how == 1) return failing();
    return real(fd, parts, how == 2 && n > 1 ? n / 2 : n);
}
int rename(const char *from, const char *to) {
    REAL(rename, int, const char *, const char *);
    if (below(to) && strike()) return failing();
    return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat, int, int, const char *, int, const char *);
    if (below(to) && strike()) return failing();
    return real(a, from, b, to);
}
int link(const char *from, const char *to) {
    REAL(link, int, const char *, const char *);
    if (below(to) && strike()) return failing();
    return real(from, to);
}
int mkdir(const char *path, mode_t bits) {
    REAL(mkdir, int, const char *, mode_t);
    if (below(path) && strike()) return failing();
    return real(path, bits);
}
int fsync(int fd) {
    REAL(fsync, int, int);
    if (below_fd(fd) && strike()) return failing();
    return real(fd);
}
int fdatasync(int fd) {
    REAL(fdatasync, int, int);
    if (below_fd(fd) && strike()) return failing();
    return real(fd);
}
