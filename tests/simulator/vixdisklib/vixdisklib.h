/* SPDX-License-Identifier: GPL-3.0-or-later */
/* GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt) */

/* The part of libvixDiskLib's binary interface (x86-64) that the test double shows, and what its files share. */

#ifndef VIXDISKLIB_DOUBLE_H
#define VIXDISKLIB_DOUBLE_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__ ((visibility ("default")))

typedef uint64_t VixError;

enum {
  VIX_OK = 0,
  VIX_E_FAIL = 1,
  VIX_E_OUT_OF_MEMORY = 2,
  VIX_E_INVALID_ARG = 3,
  VIX_E_FILE_NOT_FOUND = 4,
  VIX_E_OBJECT_IS_BUSY = 5,
  VIX_E_NOT_SUPPORTED = 6,
  VIX_E_DISK_FULL = 8,
  VIX_E_FILE_READ_ONLY = 11,
  VIX_E_FILE_ACCESS_ERROR = 13,
  VIX_E_FILE_ALREADY_LOCKED = 15,
  VIX_E_HOST_USER_PERMISSIONS = 3014,
  VIX_E_VM_NOT_FOUND = 4000,
  VIX_E_SERVER_NOT_FOUND = 14008,
  VIX_E_NETWORK_CONN_REFUSED = 14009,
  VIX_E_TCP_SOCKET_ERROR = 14010,
  VIX_E_TCP_CONN_LOST = 14011,
  VIX_E_SERVER_NOT_AVAILABLE = 14015,
  VIX_E_INVALID = 16000,
  VIX_E_OUTOFRANGE = 16007,
  VIX_E_SUBSYSTEM_INIT_FAIL = 16053,
  VIX_E_INVALID_CONNECTION = 16054,
  VIX_E_NOLICENSE = 16064,
  VIX_E_CANNOT_CONNECT_TO_HOST = 18000,
  VIX_ASYNC = 25000,
};

enum {
  OPEN_UNBUFFERED = 1,
  OPEN_SINGLE_LINK = 2,
  OPEN_READ_ONLY = 4,
  OPEN_ZLIB = 16,
  OPEN_FASTLZ = 32,
  OPEN_SKIPZ = 64,
};

#define SECTOR_BYTES 512u
#define MIN_CHUNK_SECTORS 128u
#define MAX_CHUNKS (512u * 1024u)

typedef void LogFunc (const char *format, va_list args);
typedef void (*CompletionFunc) (void *data, VixError result);
typedef bool (*ProgressFunc) (void *data, int percent);

enum { CRED_UID = 1 };
enum { SPEC_VMX = 0 };

typedef struct {
  char *vmxSpec;
  char *serverName;
  char *thumbPrint;
  long reserved1;
  int credType;
  union {
    struct {
      char *userName;
      char *password;
    } uid;
    void *words[3];
  } creds;
  uint32_t port;
  uint32_t nfcHostPort;
  void *reserved2[3];
  void *spec[3];
  int specType;
} ConnectParams;

typedef struct {
  uint32_t cylinders, heads, sectors;
} Geometry;

typedef struct {
  Geometry biosGeo, physGeo;
  uint64_t capacity; /* sectors */
  int adapterType;
  int numLinks;
  char *parentFileNameHint;
  char *uuid;
  uint32_t logicalSectorSize, physicalSectorSize;
} Info;

typedef struct {
  uint64_t offset, length; /* sectors */
} Block;

typedef struct {
  uint32_t numBlocks;
  Block blocks[];
} BlockList;

_Static_assert (sizeof (ConnectParams) == 128, "ConnectParams");
_Static_assert (offsetof (ConnectParams, credType) == 32, "credType");
_Static_assert (offsetof (ConnectParams, creds) == 40, "creds");
_Static_assert (offsetof (ConnectParams, port) == 64, "port");
_Static_assert (offsetof (ConnectParams, nfcHostPort) == 68, "nfcHostPort");
_Static_assert (offsetof (ConnectParams, specType) == 120, "specType");
_Static_assert (sizeof (Info) == 64, "Info");
_Static_assert (offsetof (Info, capacity) == 24 && offsetof (Info, uuid) == 48, "Info");
_Static_assert (offsetof (BlockList, blocks) == 8, "BlockList");

/* log.c: lines for the caller's log functions; the library adds the line's end. */
extern LogFunc *log_function, *warn_function;
void say (const char *format, ...) __attribute__ ((format (printf, 1, 2)));
void complain (const char *format, ...) __attribute__ ((format (printf, 1, 2)));
const char *error_text (VixError error);

/* wire.c: sockets and the little JSON that the simulator's vCenter port speaks. */
struct text {
  char *bytes;
  size_t length, space;
  bool failed;
};
void text_add (struct text *text, const char *bytes);
void text_add_string (struct text *text, const char *bytes); /* quoted */
void text_free (struct text *text);                          /* wiped: a password may be in it */

int tcp_connect (const char *host, uint32_t port, int timeout_ms, VixError *error);
bool send_all (int fd, const void *bytes, size_t length);
bool send_two (int fd, const void *head, size_t head_length, const void *body, size_t body_length);
bool receive_all (int fd, void *bytes, size_t length);
char *receive_line (int fd, int timeout_ms); /* malloc'ed, without its end; NULL: connection over or time over */

char *json_string (const char *object, const char *key);                   /* malloc'ed; NULL: not there */
uint64_t json_number (const char *object, const char *key, uint64_t other);
bool json_true (const char *object, const char *key);
char *json_item (const char *object, const char *key, unsigned index);     /* of an array of strings */

#endif
