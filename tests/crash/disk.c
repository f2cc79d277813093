/* A disk that fails. Preloaded into a process, it sees what the process does to files below a folder; from `disk_arm` to `disk_disarm`
 * it counts this, kills the process at the n-th change (of a write, half is done), lets changes fail or wait, and writes all of them down
 * (disk.py reads that). Paths of open files come from /proc, so that a renamed folder has its present name. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char under[PATH_MAX], failing[32];
static long count, kill_at, fail_from, fail_to;
static int armed, log_file = -1, error_number, wait_microseconds;

void disk_arm(const char *folder, long kill, const char *kinds, long from, long to, int error, int microseconds, const char *log) {
    snprintf(under, sizeof under, "%s", folder);
    snprintf(failing, sizeof failing, "%s", kinds);
    count = 0, kill_at = kill, fail_from = from, fail_to = to, error_number = error, wait_microseconds = microseconds;
    if (*log) {
        log_file = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (log_file < 0) abort();
    }
    armed = 1;
}

long disk_disarm(void) {
    pthread_mutex_lock(&lock);
    armed = 0;
    if (log_file >= 0) close(log_file);
    log_file = -1;
    pthread_mutex_unlock(&lock);
    return count;
}

static int is_under(const char *path) {
    size_t length = strlen(under);
    return strncmp(path, under, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int path_of(int file, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

static void path_at(int folder, const char *name, char *path) {
    char base[PATH_MAX];
    if (*name == '/') snprintf(path, PATH_MAX, "%s", name);
    else if (folder == AT_FDCWD ? getcwd(base, sizeof base) != NULL : path_of(folder, base)) {
        if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) abort();
    } else snprintf(path, PATH_MAX, "%s", name);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Before a change of a kind: holds the lock where it is one of ours. Returns 0: go on, unseen; 1: do it and call `done`; -1: it fails. */
static int begin(char kind, const char *path, const char *second) {
    if (!armed || !(is_under(path) || (second && is_under(second)))) return 0;
    if (wait_microseconds) usleep(wait_microseconds);
    pthread_mutex_lock(&lock);
    if (!armed) { pthread_mutex_unlock(&lock); return 0; }
    count++;
    if (count == kill_at && kind != 'w') die();
    if (strchr(failing, kind) && count >= fail_from && count <= fail_to) {
        pthread_mutex_unlock(&lock);
        errno = error_number;
        return -1;
    }
    return 1;
}

static void done(int is_done, char kind, const char *path, const char *second, const void *data, size_t size, off_t offset) {
    int error = errno;
    if (is_done && log_file >= 0) {
        struct timespec now;
        char head[2 * PATH_MAX + 128];
        clock_gettime(CLOCK_MONOTONIC, &now);
        int length = snprintf(head, sizeof head, "%ld%09ld %c %zu %ld %s\t%s\n", now.tv_sec, now.tv_nsec, kind, size, (long)offset, path, second ? second : "");
        static ssize_t (*write_vector)(int, const struct iovec *, int);
        if (!write_vector) write_vector = dlsym(RTLD_NEXT, "writev");
        struct iovec parts[] = {{head, length}, {(void *)data, size}};
        if (write_vector(log_file, parts, 2) != (ssize_t)(length + size)) abort();
    }
    pthread_mutex_unlock(&lock);
    errno = error;
}

static int open_any(int (*real)(int, const char *, int, ...), int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    if (!armed || !(flags & (O_CREAT | O_TRUNC))) return real(folder, name, flags, mode);
    path_at(folder, name, path);
    char kind = faccessat(folder, name, F_OK, 0) == 0 ? (flags & O_TRUNC ? 't' : 0) : (flags & O_CREAT ? 'c' : 0);
    int seen = kind ? begin(kind, path, NULL) : 0;
    if (seen < 0) return -1;
    int file = real(folder, name, flags, mode);
    if (seen) done(file >= 0, kind, path, NULL, NULL, 0, 0);
    return file;
}

#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list words; va_start(words, flags); mode = va_arg(words, mode_t); va_end(words); }

int open(const char *name, int flags, ...) { MODE REAL(int, "openat", int, const char *, int, ...); return open_any(real, AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE REAL(int, "openat64", int, const char *, int, ...); return open_any(real, AT_FDCWD, name, flags, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE REAL(int, "openat", int, const char *, int, ...); return open_any(real, folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE REAL(int, "openat64", int, const char *, int, ...); return open_any(real, folder, name, flags, mode); }

static ssize_t write_any(int file, const void *data, size_t size, off_t offset, int is_at) {
    REAL(ssize_t, "write", int, const void *, size_t);
    static ssize_t (*real_at)(int, const void *, size_t, off_t);
    if (!real_at) real_at = dlsym(RTLD_NEXT, "pwrite64");
    char path[PATH_MAX];
    int seen = armed && path_of(file, path) ? begin('w', path, NULL) : 0;
    if (seen < 0) return -1;
    if (seen && !is_at) offset = fcntl(file, F_GETFL) & O_APPEND ? lseek(file, 0, SEEK_END) : lseek(file, 0, SEEK_CUR);
    if (seen && count == kill_at) {
        if (real_at(file, data, size / 2, offset) < 0) abort();
        die();
    }
    ssize_t written = is_at ? real_at(file, data, size, offset) : real(file, data, size);
    if (seen) done(written > 0, 'w', path, NULL, data, written > 0 ? written : 0, offset);
    return written;
}

ssize_t write(int file, const void *data, size_t size) { return write_any(file, data, size, 0, 0); }
ssize_t pwrite(int file, const void *data, size_t size, off_t offset) { return write_any(file, data, size, offset, 1); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) { return write_any(file, data, size, offset, 1); }
ssize_t writev(int file, const struct iovec *parts, int number) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    char path[PATH_MAX];
    if (!armed || !path_of(file, path) || !is_under(path)) return real(file, parts, number);
    return number ? write(file, parts[0].iov_base, parts[0].iov_len) : 0; /* a part of it, as a system may */
}

static int sync_any(int (*real)(int), int file) {
    char path[PATH_MAX];
    int seen = armed && path_of(file, path) ? begin('f', path, NULL) : 0;
    if (seen < 0) return -1;
    int result = real(file);
    if (seen) done(result == 0, 'f', path, NULL, NULL, 0, 0);
    return result;
}

int fsync(int file) { REAL(int, "fsync", int); return sync_any(real, file); }
int fdatasync(int file) { REAL(int, "fdatasync", int); return sync_any(real, file); }

#define CHANGE(kind, first, second, call) \
    int seen = begin(kind, first, second); \
    if (seen < 0) return -1; \
    int result = call; \
    if (seen) done(result == 0, kind, first, second, NULL, 0, 0); \
    return result

int ftruncate64(int file, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    char path[PATH_MAX];
    int seen = armed && path_of(file, path) ? begin('s', path, NULL) : 0;
    if (seen < 0) return -1;
    int result = real(file, size);
    if (seen) done(result == 0, 's', path, NULL, NULL, 0, size);
    return result;
}
int ftruncate(int file, off_t size) { return ftruncate64(file, size); }

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    char first[PATH_MAX], second[PATH_MAX];
    path_at(from, old, first), path_at(to, new, second);
    CHANGE(flags & RENAME_EXCHANGE ? 'x' : 'r', first, second, real(from, old, to, new, flags));
}
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }

int mkdirat(int folder, const char *name, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    char path[PATH_MAX];
    path_at(folder, name, path);
    CHANGE('m', path, NULL, real(folder, name, mode));
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int unlinkat(int folder, const char *name, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char path[PATH_MAX];
    path_at(folder, name, path);
    CHANGE(flags & AT_REMOVEDIR ? 'd' : 'u', path, NULL, real(folder, name, flags));
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int linkat(int from, const char *old, int to, const char *new, int flags) {
    REAL(int, "linkat", int, const char *, int, const char *, int);
    char first[PATH_MAX], second[PATH_MAX];
    path_at(from, old, first), path_at(to, new, second);
    CHANGE('l', first, second, real(from, old, to, new, flags));
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
