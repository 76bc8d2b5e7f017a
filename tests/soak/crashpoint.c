// SPDX-License-Identifier: GPL-3.0-or-later
// GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
//
// A preload library for crash tests. It counts the calls that change files or send data, over all threads of all
// processes of a run, and kills right before the N-th. The counter lies in a file that the processes share: a process
// maps the file named by $CRASHPOINT_FILE when it starts, or the one given to crashpoint_attach(). With
// $CRASHPOINT_ONLY a process takes part only if its command line holds that text.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

// The layout of the shared file; runner.py knows it too.
struct shared {
    _Atomic uint64_t calls;        // counted so far, of all processes
    _Atomic uint64_t child_calls;  // of these, by others than the module
    uint64_t kill_at;              // kill before this call of all; 0: only count
    uint64_t kill_child_at;        // kill the caller before this call of the module's children; 0: only count
    int32_t module;                // process id of the module; 0: whoever makes the call is killed
    _Atomic int32_t killed;        // process id of who was killed
    char before[32];               // the call that was about to be made
    char program[32];              // and by which program
};

static struct shared *shared;

int crashpoint_attach(const char *path) {
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -1;
    void *map = mmap(NULL, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED)
        return -1;
    shared = map;
    return 0;
}

__attribute__((constructor)) static void attach_at_start(void) {
    const char *path = getenv("CRASHPOINT_FILE"), *only = getenv("CRASHPOINT_ONLY");
    if (path == NULL)
        return;
    if (only != NULL) {
        char line[4096] = "";
        int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
        ssize_t length = fd < 0 ? 0 : read(fd, line, sizeof line - 1);
        if (fd >= 0)
            close(fd);
        for (ssize_t at = 0; at < length; at++)
            if (line[at] == '\0')
                line[at] = ' ';
        if (strstr(line, only) == NULL)
            return;
    }
    if (crashpoint_attach(path) != 0)
        abort();
}

static void die(struct shared *here, pid_t victim, const char *call) {
    int32_t nobody = 0;
    if (!atomic_compare_exchange_strong(&here->killed, &nobody, (int32_t)victim))
        return;
    strncpy(here->before, call, sizeof here->before - 1);
    strncpy(here->program, program_invocation_short_name, sizeof here->program - 1);
    kill(victim, SIGKILL);
}

static void count(const char *call) {
    struct shared *here = shared;
    if (here == NULL)
        return;
    pid_t self = getpid();
    uint64_t number = atomic_fetch_add(&here->calls, 1) + 1;
    if (here->kill_at != 0 && number == here->kill_at)
        die(here, here->module != 0 ? here->module : self, call);
    if (self != here->module) {
        number = atomic_fetch_add(&here->child_calls, 1) + 1;
        if (here->kill_child_at != 0 && number == here->kill_child_at)
            die(here, self, call);
    }
}

// What goes to a pipe or wakes a thread leaves no trace that could outlive the process.
static void count_data(const char *call, int fd) {
    struct stat status;
    if (shared == NULL || fstat(fd, &status) != 0)
        return;
    if (S_ISREG(status.st_mode) || S_ISDIR(status.st_mode) || S_ISSOCK(status.st_mode))
        count(call);
}

#define REAL(type, name, parameters)                                                                                   \
    static type(*real) parameters;                                                                                     \
    if (real == NULL)                                                                                                  \
    real = (type(*) parameters)dlsym(RTLD_NEXT, #name)

#define ON_DATA(type, name, parameters, arguments)                                                                     \
    type name parameters {                                                                                             \
        REAL(type, name, parameters);                                                                                  \
        count_data(#name, fd);                                                                                         \
        return real arguments;                                                                                         \
    }

#define ON_NAMES(name, parameters, arguments)                                                                          \
    int name parameters {                                                                                              \
        REAL(int, name, parameters);                                                                                   \
        count(#name);                                                                                                  \
        return real arguments;                                                                                         \
    }

ON_DATA(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
ON_DATA(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON_DATA(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
ON_DATA(ssize_t, writev, (int fd, const struct iovec *data, int pieces), (fd, data, pieces))
ON_DATA(ssize_t, pwritev, (int fd, const struct iovec *data, int pieces, off_t at), (fd, data, pieces, at))
ON_DATA(ssize_t, pwritev64, (int fd, const struct iovec *data, int pieces, off64_t at), (fd, data, pieces, at))
ON_DATA(ssize_t, sendmsg, (int fd, const struct msghdr *message, int flags), (fd, message, flags))
ON_DATA(int, fsync, (int fd), (fd))
ON_DATA(int, fdatasync, (int fd), (fd))
ON_DATA(int, ftruncate, (int fd, off_t size), (fd, size))
ON_DATA(int, ftruncate64, (int fd, off64_t size), (fd, size))
ON_DATA(int, fallocate, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size))
ON_DATA(int, fallocate64, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size))

ON_NAMES(rename, (const char *from, const char *to), (from, to))
ON_NAMES(renameat, (int from_fd, const char *from, int to_fd, const char *to), (from_fd, from, to_fd, to))
ON_NAMES(renameat2, (int from_fd, const char *from, int to_fd, const char *to, unsigned flags),
         (from_fd, from, to_fd, to, flags))
ON_NAMES(link, (const char *from, const char *to), (from, to))
ON_NAMES(linkat, (int from_fd, const char *from, int to_fd, const char *to, int flags),
         (from_fd, from, to_fd, to, flags))
ON_NAMES(unlink, (const char *path), (path))
ON_NAMES(unlinkat, (int fd, const char *path, int flags), (fd, path, flags))
ON_NAMES(rmdir, (const char *path), (path))
ON_NAMES(mkdir, (const char *path, mode_t mode), (path, mode))
ON_NAMES(mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode))
