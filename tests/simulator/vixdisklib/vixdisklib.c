/* SPDX-License-Identifier: GPL-3.0-or-later */
/* GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt) */

/* A test double of libvixDiskLib. It has the library's binary interface and checks what the library checks, and gets
 * its data from the simulator: a conversation with the simulated vCenter's port at each open, then a connection to the
 * NFC port of the host that vCenter named. Unlike the library it forgives nothing: an unknown pointer, a call after
 * Close, opens and closes that overlap, two synchronous reads at once are refused and said aloud. */

#include <ctype.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "vixdisklib.h"

#define MAGIC 0x3143464eu
#define LARGEST_REQUEST (64u << 20)
#define NETWORK_CONNECT "NBD_ERR_NETWORK_CONNECT"

enum { NFC_READ = 1, NFC_WRITE, NFC_ALLOCATED, NFC_FLUSH, NFC_CLOSE };

struct nfc_request {
  uint32_t magic;
  uint16_t type, zero;
  uint64_t id, offset, length, chunk;
} __attribute__ ((packed));

struct nfc_reply {
  uint32_t magic, error;
  uint64_t id, length;
} __attribute__ ((packed));

struct pending {
  struct pending *next;
  uint64_t id, length, submitted; /* milliseconds */
  int type;
  void *buffer;           /* READ: the caller's; ALLOCATED: malloc'ed by the receiver */
  CompletionFunc complete; /* NULL: somebody waits for `done` */
  void *data;
  bool done;
  VixError result;
};

struct connection {
  char *vmx, *server, *thumbprint, *user, *password, *snapshot, *transports;
  uint32_t port, nfc_port;
  bool read_only;
  unsigned handles; /* guarded by registry */
};

struct handle {
  struct connection *connection;
  unsigned users; /* calls that are inside; guarded by registry */
  char *path, *host, *name, *mode, *uuid, *parent, *url, *device; /* host: the address; name: whose */
  const char *compression;
  bool local, ide; /* local: by san or hotadd, without a host's help */
  uint64_t sectors;
  int links;
  bool read_only;
  int fd;
  pthread_t receiver;
  pthread_mutex_t send_lock;
  pthread_mutex_t lock; /* guards what follows */
  pthread_cond_t changed;
  struct pending *pending;
  unsigned callbacks;
  uint64_t next_id, last_reply;
  VixError lost;
  bool closing, synchronous;
};

static struct {
  bool initialised;
  uint64_t buffer_64k, buffer_count;
  char *tmp, *san_allow, *san_deny;
  int accept_ms, request_ms, read_ms, write_ms;
} settings;

/* What we gave out. A pointer that is not here is not ours, or not any more. */

enum kind { PARAMS, CONNECTION, HANDLE, INFO, BLOCKS, TEXT };

struct object {
  struct object *next;
  enum kind kind;
  void *pointer;
};

static pthread_mutex_t registry = PTHREAD_MUTEX_INITIALIZER;
static struct object *objects;

static bool
remember (enum kind kind, void *pointer)
{
  struct object *object = malloc (sizeof *object);

  if (object == NULL)
    return false;
  pthread_mutex_lock (&registry);
  *object = (struct object) { objects, kind, pointer };
  objects = object;
  pthread_mutex_unlock (&registry);
  return true;
}

/* With the registry locked. */
static struct object **
look_up (enum kind kind, const void *pointer)
{
  struct object **at;

  for (at = &objects; *at != NULL; at = &(*at)->next)
    if ((*at)->kind == kind && (*at)->pointer == pointer)
      return at;
  return NULL;
}

static void
drop (struct object **at)
{
  struct object *object = *at;

  *at = object->next;
  free (object);
}

static bool
known (enum kind kind, const void *pointer, const char *function)
{
  bool found;

  pthread_mutex_lock (&registry);
  found = look_up (kind, pointer) != NULL;
  pthread_mutex_unlock (&registry);
  if (!found)
    complain ("VixDiskLib: %s: a pointer that is not (or no longer) the library's", function);
  return found;
}

static bool
forget (enum kind kind, const void *pointer, const char *function)
{
  struct object **at;
  bool found;

  pthread_mutex_lock (&registry);
  at = look_up (kind, pointer);
  found = at != NULL;
  if (found)
    drop (at);
  pthread_mutex_unlock (&registry);
  if (!found)
    complain ("VixDiskLib: %s: a pointer that is not (or no longer) the library's", function);
  return found;
}

static struct handle *
enter (void *pointer, const char *function)
{
  struct handle *h = NULL;

  pthread_mutex_lock (&registry);
  if (look_up (HANDLE, pointer) != NULL) {
    h = pointer;
    h->users++;
  }
  pthread_mutex_unlock (&registry);
  if (h == NULL)
    complain ("VixDiskLib: %s: the handle is not (or no longer) open", function);
  return h;
}

static VixError
leave (struct handle *h, VixError error)
{
  pthread_mutex_lock (&registry);
  h->users--;
  pthread_mutex_unlock (&registry);
  return error;
}

/* Opens and closes must not overlap: the library's guide wants them from one thread. */

static atomic_bool opening;

static bool
begin_alone (const char *function)
{
  if (atomic_exchange (&opening, true)) {
    complain ("VixDiskLib: %s overlaps another open or close", function);
    return false;
  }
  return true;
}

static VixError
end_alone (VixError error)
{
  atomic_store (&opening, false);
  return error;
}

static uint64_t
now_ms (void)
{
  struct timespec now;

  clock_gettime (CLOCK_MONOTONIC, &now);
  return now.tv_sec * UINT64_C (1000) + now.tv_nsec / 1000000;
}

/* Copies NULL as an empty string. */
static char *
copy (const char *text)
{
  return strdup (text != NULL ? text : "");
}

/* InitEx and Exit */

static void
forget_texts (void)
{
  free (settings.tmp);
  free (settings.san_allow);
  free (settings.san_deny);
  settings.tmp = settings.san_allow = settings.san_deny = NULL;
}

static void
take_setting (const char *key, const char *value)
{
  static const struct {
    const char *key;
    int *milliseconds;
  } timeouts[] = {
    { "vixDiskLib.nfc.AcceptTimeoutMs", &settings.accept_ms },
    { "vixDiskLib.nfc.RequestTimeoutMs", &settings.request_ms },
    { "vixDiskLib.nfc.ReadTimeoutMs", &settings.read_ms },
    { "vixDiskLib.nfc.WriteTimeoutMs", &settings.write_ms },
  };
  static const struct {
    const char *key;
    char **text;
  } texts[] = {
    { "tmpDirectory", &settings.tmp },
    { "vixDiskLib.transport.san.allowList", &settings.san_allow },
    { "vixDiskLib.transport.san.whitelist", &settings.san_allow },
    { "vixDiskLib.transport.san.denyList", &settings.san_deny },
    { "vixDiskLib.transport.san.blacklist", &settings.san_deny },
  };
  size_t i;

  for (i = 0; i < sizeof texts / sizeof texts[0]; i++)
    if (strcmp (key, texts[i].key) == 0) {
      free (*texts[i].text);
      *texts[i].text = copy (value);
    }
  if (strcmp (key, "vixDiskLib.nfcAio.Session.BufSizeIn64KB") == 0)
    settings.buffer_64k = strtoull (value, NULL, 10);
  else if (strcmp (key, "vixDiskLib.nfcAio.Session.BufCount") == 0)
    settings.buffer_count = strtoull (value, NULL, 10);
  else
    for (i = 0; i < sizeof timeouts / sizeof timeouts[0]; i++)
      if (strcmp (key, timeouts[i].key) == 0)
        *timeouts[i].milliseconds = atoi (value);
}

static char *
trim (char *text)
{
  size_t length;

  text += strspn (text, " \t\r\n");
  length = strlen (text);
  while (length > 0 && isspace ((unsigned char) text[length - 1]))
    text[--length] = '\0';
  if (length >= 2 && text[0] == '"' && text[length - 1] == '"') {
    text[length - 1] = '\0';
    text++;
  }
  return text;
}

static VixError
read_config (const char *name)
{
  FILE *file = fopen (name, "re");
  char *line = NULL;
  size_t space = 0;
  VixError error = VIX_OK;

  if (file == NULL) {
    complain ("VixDiskLib: the configuration file %s can't be read: %s", name, strerror (errno));
    return VIX_E_FILE_NOT_FOUND;
  }
  while (error == VIX_OK && getline (&line, &space, file) != -1) {
    char *equals = strchr (line, '='), *key, *value;

    key = trim (line);
    if (*key == '\0' || *key == '#')
      continue;
    if (equals == NULL) {
      complain ("VixDiskLib: %s: not a setting: %s", name, key);
      error = VIX_E_INVALID_ARG;
      break;
    }
    *equals = '\0';
    key = trim (key);
    value = trim (equals + 1);
    take_setting (key, value);
    if (strcmp (key, "tmpDirectory") == 0 && access (value, W_OK | X_OK) == -1) {
      complain ("VixDiskLib: tmpDirectory %s: %s", value, strerror (errno));
      error = VIX_E_SUBSYSTEM_INIT_FAIL;
    }
  }
  free (line);
  fclose (file);
  return error;
}

EXPORT VixError
VixDiskLib_InitEx (uint32_t major, uint32_t minor, LogFunc *log, LogFunc *warn, LogFunc *panic, const char *lib_dir,
                   const char *config_file)
{
  VixError error = VIX_OK;

  (void) panic;
  log_function = log;
  warn_function = warn;
  if (settings.initialised) {
    complain ("VixDiskLib: VixDiskLib_InitEx: called twice");
    return VIX_E_FAIL;
  }
  if (major < 5 || major > 9) {
    complain ("VixDiskLib: there is no version %u.%u", major, minor);
    return VIX_E_INVALID_ARG;
  }
  forget_texts ();
  settings.buffer_64k = 1;
  settings.buffer_count = 4;
  settings.accept_ms = settings.request_ms = 180000;
  settings.read_ms = 60000;
  settings.write_ms = 600000;
  say ("VMware VixDiskLib (8.0.3) test double, API %u.%u, libdir %s", major, minor, lib_dir != NULL ? lib_dir : "-");
  if (config_file != NULL && *config_file != '\0')
    error = read_config (config_file);
  /* without a fixed folder for them nobody finds the traces of this process again */
  if (settings.tmp == NULL && asprintf (&settings.tmp, "/tmp/vmware-%ld", (long) getpid ()) == -1)
    settings.tmp = NULL;
  settings.initialised = error == VIX_OK;
  return error;
}

EXPORT void
VixDiskLib_Exit (void)
{
  static const char *const names[] = { "ConnectParams", "connection", "handle", "Info", "BlockList", "text" };
  struct object *object;

  pthread_mutex_lock (&registry);
  for (object = objects; object != NULL; object = object->next)
    complain ("VixDiskLib: VixDiskLib_Exit: a %s was not given back", names[object->kind]);
  pthread_mutex_unlock (&registry);
  settings.initialised = false;
  forget_texts ();
}

EXPORT char *
VixDiskLib_GetErrorText (VixError error, const char *locale)
{
  char *text = copy (error_text (error));

  (void) locale;
  if (text != NULL && !remember (TEXT, text)) {
    free (text);
    return NULL;
  }
  return text;
}

EXPORT void
VixDiskLib_FreeErrorText (char *text)
{
  if (text != NULL && forget (TEXT, text, "VixDiskLib_FreeErrorText"))
    free (text);
}

EXPORT ConnectParams *
VixDiskLib_AllocateConnectParams (void)
{
  ConnectParams *params = calloc (1, sizeof *params);

  if (params != NULL && !remember (PARAMS, params)) {
    free (params);
    return NULL;
  }
  return params;
}

/* The strings are the caller's. */
EXPORT void
VixDiskLib_FreeConnectParams (ConnectParams *params)
{
  if (params != NULL && forget (PARAMS, params, "VixDiskLib_FreeConnectParams"))
    free (params);
}

EXPORT const char *
VixDiskLib_ListTransportModes (void)
{
  return "file:san:hotadd:nbdssl:nbd";
}

/* Connections */

static void
free_connection (struct connection *c)
{
  if (c->password != NULL)
    explicit_bzero (c->password, strlen (c->password));
  free (c->vmx);
  free (c->server);
  free (c->thumbprint);
  free (c->user);
  free (c->password);
  free (c->snapshot);
  free (c->transports);
  free (c);
}

/* A copy of the parameters; nobody is asked yet. */
static VixError
make_connection (const ConnectParams *params, bool vm_wanted, const char *function, struct connection **result)
{
  struct connection *c;

  if (!settings.initialised) {
    complain ("VixDiskLib: %s before VixDiskLib_InitEx", function);
    return VIX_E_SUBSYSTEM_INIT_FAIL;
  }
  if (params == NULL || !known (PARAMS, params, function))
    return VIX_E_INVALID_ARG;
  if (params->credType != CRED_UID) {
    complain ("VixDiskLib: %s: only user name and password are known here, not credentials of type %d", function,
              params->credType);
    return VIX_E_NOT_SUPPORTED;
  }
  if (params->specType != SPEC_VMX || params->serverName == NULL || params->creds.uid.userName == NULL
      || params->creds.uid.password == NULL || (vm_wanted && params->vmxSpec == NULL) || params->port > 65535
      || params->nfcHostPort > 65535) {
    complain ("VixDiskLib: %s: server, user, password and VM are all needed", function);
    return VIX_E_INVALID_ARG;
  }
  c = calloc (1, sizeof *c);
  if (c == NULL)
    return VIX_E_OUT_OF_MEMORY;
  c->vmx = copy (params->vmxSpec);
  c->server = copy (params->serverName);
  c->thumbprint = copy (params->thumbPrint);
  c->user = copy (params->creds.uid.userName);
  c->password = copy (params->creds.uid.password);
  c->port = params->port != 0 ? params->port : 443;
  c->nfc_port = params->nfcHostPort != 0 ? params->nfcHostPort : 902;
  if (c->vmx == NULL || c->server == NULL || c->thumbprint == NULL || c->user == NULL || c->password == NULL) {
    free_connection (c);
    return VIX_E_OUT_OF_MEMORY;
  }
  *result = c;
  return VIX_OK;
}

EXPORT VixError
VixDiskLib_ConnectEx (const ConnectParams *params, char read_only, const char *snapshot, const char *transports,
                      void **result)
{
  struct connection *c = NULL;
  VixError error;

  if (!begin_alone ("VixDiskLib_ConnectEx"))
    return VIX_E_OBJECT_IS_BUSY;
  error = result == NULL ? VIX_E_INVALID_ARG : make_connection (params, true, "VixDiskLib_ConnectEx", &c);
  if (error != VIX_OK)
    return end_alone (error);
  c->read_only = read_only != 0;
  c->snapshot = copy (snapshot);
  c->transports = copy (transports);
  if (c->snapshot == NULL || c->transports == NULL || !remember (CONNECTION, c)) {
    free_connection (c);
    return end_alone (VIX_E_OUT_OF_MEMORY);
  }
  say ("VixDiskLib: VixDiskLib_ConnectEx: Establish connection with %s, VM %s, snapshot %s, transport modes %s.",
       c->server, c->vmx, *c->snapshot ? c->snapshot : "(none)", *c->transports ? c->transports : "(default)");
  *result = c;
  return end_alone (VIX_OK);
}

EXPORT VixError
VixDiskLib_Disconnect (void *pointer)
{
  struct connection *c = pointer;
  struct object **at;
  VixError error = VIX_OK;

  if (!begin_alone ("VixDiskLib_Disconnect"))
    return VIX_E_OBJECT_IS_BUSY;
  pthread_mutex_lock (&registry);
  at = look_up (CONNECTION, pointer);
  if (at == NULL)
    error = VIX_E_INVALID_CONNECTION;
  else if (c->handles > 0)
    error = VIX_E_OBJECT_IS_BUSY;
  else
    drop (at);
  pthread_mutex_unlock (&registry);
  if (error != VIX_OK)
    complain ("VixDiskLib: VixDiskLib_Disconnect: %s",
              error == VIX_E_OBJECT_IS_BUSY ? "a disk is still open" : "not (or no longer) a connection");
  else {
    say ("VixDiskLib: VixDiskLib_Disconnect: Disconnect.");
    free_connection (c);
  }
  return end_alone (error);
}

/* The conversation with vCenter */

/* Send a request (which is wiped) and read the answer, NULL with *error if it is a refusal or none came. */
static char *
ask (int fd, struct text *request, VixError *error)
{
  char *answer = NULL, *line;
  unsigned i;

  text_add (request, "}\n");
  *error = VIX_E_CANNOT_CONNECT_TO_HOST;
  if (request->failed)
    *error = VIX_E_OUT_OF_MEMORY;
  else if (send_all (fd, request->bytes, request->length))
    answer = receive_line (fd, settings.accept_ms);
  text_free (request);
  if (answer == NULL) {
    say ("VixDiskLibVim: the server ended the connection or does not answer.");
    return NULL;
  }
  for (i = 0; (line = json_item (answer, "log", i)) != NULL; i++) {
    say ("%s", line);
    free (line);
  }
  if (!json_true (answer, "ok")) {
    *error = json_number (answer, "vix", VIX_E_FAIL);
    free (answer);
    return NULL;
  }
  *error = VIX_OK;
  return answer;
}

static void
add_field (struct text *text, const char *key, const char *value)
{
  text_add (text, ", \"");
  text_add (text, key);
  text_add (text, "\": ");
  text_add_string (text, value);
}

/* Does the thumbprint the caller gave name this server? A SHA-1 has 20 bytes, a SHA-256 has 32 (VADP facts 40). */
static bool
trusted (const struct connection *c, const char *sha1, const char *sha256)
{
  const char *actual = strlen (c->thumbprint) == 32 * 3 - 1 ? sha256 : sha1;

  if (actual != NULL && strcasecmp (actual, c->thumbprint) == 0)
    return true;
  say ("VixDiskLibVim: Failed to verify SSL certificate: actual thumbprint=%s expected=%s", sha1 != NULL ? sha1 : "",
       c->thumbprint);
  return false;
}

/* A logged-in connection to vCenter's port. The password is sent after the certificate was checked, as by TLS. */
static VixError
log_in (const struct connection *c, int *result)
{
  struct text request = { 0 };
  char *answer, *sha1, *sha256;
  VixError error;
  bool good;
  int fd = tcp_connect (c->server, c->port, settings.accept_ms, &error);

  if (fd == -1) {
    if (error == VIX_E_SERVER_NOT_FOUND)
      say ("VixDiskLibVim: Host address lookup for server %s failed.", c->server);
    else
      say ("VixDiskLibVim: Cannot connect to %s:%u: %s", c->server, c->port, strerror (errno));
    return error == VIX_E_SERVER_NOT_FOUND ? error : VIX_E_CANNOT_CONNECT_TO_HOST;
  }
  text_add (&request, "{\"op\": \"hello\"");
  answer = ask (fd, &request, &error);
  if (answer == NULL)
    goto failed;
  sha1 = json_string (answer, "sha1");
  sha256 = json_string (answer, "sha256");
  good = trusted (c, sha1, sha256);
  free (sha1);
  free (sha256);
  free (answer);
  if (!good) {
    error = VIX_E_FAIL;
    goto failed;
  }
  text_add (&request, "{\"op\": \"login\"");
  add_field (&request, "user", c->user);
  add_field (&request, "password", c->password);
  answer = ask (fd, &request, &error);
  if (answer == NULL)
    goto failed;
  free (answer);
  *result = fd;
  return VIX_OK;
failed:
  close (fd);
  return error;
}

/* The conversation with a host */

static struct pending **
find_pending (struct handle *h, uint64_t id)
{
  struct pending **at;

  for (at = &h->pending; *at != NULL; at = &(*at)->next)
    if ((*at)->id == id)
      return at;
  return NULL;
}

/* With h->lock held; it is let go during a callback. `p` is out of the list. */
static void
complete (struct handle *h, struct pending *p, VixError result)
{
  if (result != VIX_OK) {
    if (result == VIX_E_OUT_OF_MEMORY)
      complain ("[NFC ERROR] NfcFssrvrProcessErrorMsg: received NFC error 5 from server: Failed to allocate the "
                "requested %llu bytes", (unsigned long long) p->length);
    say ("VixDiskLib: request %llu on %s failed. Error %llu (%s).", (unsigned long long) p->id, h->url,
         (unsigned long long) result, error_text (result));
  }
  if (p->complete != NULL) {
    h->callbacks++;
    pthread_mutex_unlock (&h->lock);
    p->complete (p->data, result);
    free (p);
    pthread_mutex_lock (&h->lock);
    h->callbacks--;
  }
  else {
    p->result = result;
    p->done = true;
  }
  pthread_cond_broadcast (&h->changed);
}

static int
timeout_of (const struct pending *p)
{
  return p->type == NFC_READ ? settings.read_ms : p->type == NFC_WRITE ? settings.write_ms : settings.request_ms;
}

/* Wait for a reply to begin. Time runs from the request or from the last reply, whichever is later. */
static VixError
await_reply (struct handle *h)
{
  struct pollfd wait = { .fd = h->fd, .events = POLLIN };

  for (;;) {
    struct pending *p;
    uint64_t now;
    int got = poll (&wait, 1, 250);

    if (got > 0)
      return VIX_OK;
    if (got == -1 && errno != EINTR)
      return VIX_E_TCP_CONN_LOST;
    now = now_ms ();
    pthread_mutex_lock (&h->lock);
    for (p = h->pending; p != NULL; p = p->next) {
      uint64_t since = p->submitted > h->last_reply ? p->submitted : h->last_reply;

      if (timeout_of (p) > 0 && now > since + timeout_of (p))
        break;
    }
    pthread_mutex_unlock (&h->lock);
    if (p != NULL)
      return VIX_E_TCP_SOCKET_ERROR;
  }
}

static VixError
receive_one (struct handle *h)
{
  struct nfc_reply reply;
  struct pending **at, *p = NULL;
  VixError error = await_reply (h);
  void *buffer;
  bool good;

  if (error != VIX_OK)
    return error;
  if (!receive_all (h->fd, &reply, sizeof reply) || reply.magic != MAGIC)
    return VIX_E_TCP_CONN_LOST;
  pthread_mutex_lock (&h->lock);
  at = find_pending (h, reply.id);
  if (at != NULL)
    p = *at;
  pthread_mutex_unlock (&h->lock);
  if (p == NULL)
    return VIX_E_TCP_CONN_LOST;
  if (reply.error != 0 || (p->type != NFC_READ && p->type != NFC_ALLOCATED))
    good = reply.length == 0;
  else
    good = p->type == NFC_ALLOCATED || reply.length == p->length;
  if (!good)
    return VIX_E_TCP_CONN_LOST;
  /* only this thread takes requests out of the list, so `p` stays */
  buffer = p->buffer;
  if (reply.length > 0) {
    if (p->type == NFC_ALLOCATED)
      buffer = malloc (reply.length);
    if (buffer == NULL || !receive_all (h->fd, buffer, reply.length)) {
      if (p->type == NFC_ALLOCATED)
        free (buffer);
      return VIX_E_TCP_CONN_LOST;
    }
  }
  pthread_mutex_lock (&h->lock);
  h->last_reply = now_ms ();
  at = find_pending (h, reply.id);
  *at = p->next;
  if (p->type == NFC_ALLOCATED) {
    p->buffer = buffer;
    p->length = reply.length;
  }
  complete (h, p, reply.error);
  pthread_mutex_unlock (&h->lock);
  return VIX_OK;
}

static void *
receive (void *pointer)
{
  struct handle *h = pointer;
  struct pending *p;
  VixError error;

  while ((error = receive_one (h)) == VIX_OK)
    ;
  pthread_mutex_lock (&h->lock);
  h->lost = error;
  if (!h->closing) {
    complain ("[NFC ERROR] NfcNetTcpRead: bRead: %d", error == VIX_E_TCP_SOCKET_ERROR ? -1 : 0);
    complain ("[NFC ERROR] NfcRecvMessage: receive failed: NFC_NETWORK_ERROR, %s", h->url);
  }
  while ((p = h->pending) != NULL) {
    h->pending = p->next;
    complete (h, p, error);
  }
  pthread_mutex_unlock (&h->lock);
  return NULL;
}

/* After VIX_OK the receiver completes the request, whatever happens. */
static VixError
submit (struct handle *h, struct pending *p, uint64_t offset, const void *body, uint64_t chunk)
{
  struct nfc_request request
      = { .magic = MAGIC, .type = p->type, .offset = offset, .length = p->length, .chunk = chunk };
  struct pending **end;
  bool sent;

  pthread_mutex_lock (&h->lock);
  if (h->lost != VIX_OK) {
    VixError lost = h->lost;

    pthread_mutex_unlock (&h->lock);
    return lost;
  }
  p->id = request.id = h->next_id++;
  p->submitted = now_ms ();
  for (end = &h->pending; *end != NULL; end = &(*end)->next)
    ;
  *end = p;
  pthread_mutex_unlock (&h->lock);
  /* from here on `p` may be gone */

  pthread_mutex_lock (&h->send_lock);
  sent = send_two (h->fd, &request, sizeof request, body, body != NULL ? request.length : 0);
  pthread_mutex_unlock (&h->send_lock);
  if (!sent) {
    complain ("[NFC ERROR] NfcNetTcpWrite: bWritten: -1");
    complain ("[NFC ERROR] NfcSendMessage: send failed: NFC_NETWORK_ERROR");
    shutdown (h->fd, SHUT_RDWR);
  }
  return VIX_OK;
}

static VixError
submit_and_wait (struct handle *h, struct pending *p, uint64_t offset, const void *body, uint64_t chunk)
{
  VixError error = submit (h, p, offset, body, chunk);

  if (error != VIX_OK)
    return error;
  pthread_mutex_lock (&h->lock);
  while (!p->done)
    pthread_cond_wait (&h->changed, &h->lock);
  pthread_mutex_unlock (&h->lock);
  return p->result;
}

static VixError
check_transfer (struct handle *h, const char *function, bool write, uint64_t start, uint64_t count, const void *buffer)
{
  if (buffer == NULL || count == 0 || count > LARGEST_REQUEST / SECTOR_BYTES) {
    complain ("VixDiskLib: %s: %llu sectors can't be transferred at once", function, (unsigned long long) count);
    return VIX_E_INVALID_ARG;
  }
  if (start >= h->sectors || count > h->sectors - start) {
    complain ("VixDiskLib: %s: sectors %llu + %llu are outside of the disk", function, (unsigned long long) start,
              (unsigned long long) count);
    return VIX_E_OUTOFRANGE;
  }
  if (write && h->read_only) {
    complain ("VixDiskLib: %s: %s is open for reading only", function, h->path);
    return VIX_E_FILE_READ_ONLY;
  }
  return VIX_OK;
}

static VixError
transfer (void *pointer, const char *function, int type, uint64_t start, uint64_t count, void *buffer)
{
  struct pending p = { .type = type, .length = count * SECTOR_BYTES, .buffer = type == NFC_READ ? buffer : NULL };
  struct handle *h = enter (pointer, function);
  VixError error;

  if (h == NULL)
    return VIX_E_INVALID_ARG;
  error = check_transfer (h, function, type == NFC_WRITE, start, count, buffer);
  if (error != VIX_OK)
    return leave (h, error);
  pthread_mutex_lock (&h->lock);
  if (h->synchronous) {
    pthread_mutex_unlock (&h->lock);
    complain ("VixDiskLib: %s: another synchronous call runs on this handle", function);
    return leave (h, VIX_E_OBJECT_IS_BUSY);
  }
  h->synchronous = true;
  pthread_mutex_unlock (&h->lock);
  error = submit_and_wait (h, &p, start * SECTOR_BYTES, type == NFC_WRITE ? buffer : NULL, 0);
  pthread_mutex_lock (&h->lock);
  h->synchronous = false;
  pthread_mutex_unlock (&h->lock);
  return leave (h, error);
}

static VixError
transfer_async (void *pointer, const char *function, int type, uint64_t start, uint64_t count, void *buffer,
                CompletionFunc callback, void *data)
{
  struct handle *h = enter (pointer, function);
  struct pending *p;
  VixError error;

  if (h == NULL)
    return VIX_E_INVALID_ARG;
  error = callback == NULL ? VIX_E_INVALID_ARG
                           : check_transfer (h, function, type == NFC_WRITE, start, count, buffer);
  if (error != VIX_OK)
    return leave (h, error);
  p = calloc (1, sizeof *p);
  if (p == NULL)
    return leave (h, VIX_E_OUT_OF_MEMORY);
  p->type = type;
  p->length = count * SECTOR_BYTES;
  p->buffer = type == NFC_READ ? buffer : NULL;
  p->complete = callback;
  p->data = data;
  error = submit (h, p, start * SECTOR_BYTES, type == NFC_WRITE ? buffer : NULL, 0);
  if (error != VIX_OK)
    free (p);
  return leave (h, error == VIX_OK ? VIX_ASYNC : error);
}

EXPORT VixError
VixDiskLib_Read (void *handle, uint64_t start, uint64_t count, unsigned char *buffer)
{
  return transfer (handle, "VixDiskLib_Read", NFC_READ, start, count, buffer);
}

EXPORT VixError
VixDiskLib_Write (void *handle, uint64_t start, uint64_t count, const unsigned char *buffer)
{
  return transfer (handle, "VixDiskLib_Write", NFC_WRITE, start, count, (void *) buffer);
}

EXPORT VixError
VixDiskLib_ReadAsync (void *handle, uint64_t start, uint64_t count, unsigned char *buffer, CompletionFunc callback,
                      void *data)
{
  return transfer_async (handle, "VixDiskLib_ReadAsync", NFC_READ, start, count, buffer, callback, data);
}

EXPORT VixError
VixDiskLib_WriteAsync (void *handle, uint64_t start, uint64_t count, const unsigned char *buffer,
                       CompletionFunc callback, void *data)
{
  return transfer_async (handle, "VixDiskLib_WriteAsync", NFC_WRITE, start, count, (void *) buffer, callback, data);
}

/* Every asynchronous request so far is complete, its callback included. */
static VixError
wait_for_all (struct handle *h)
{
  if (pthread_equal (pthread_self (), h->receiver)) {
    complain ("VixDiskLib: VixDiskLib_Wait: called from a callback");
    return VIX_E_OBJECT_IS_BUSY;
  }
  pthread_mutex_lock (&h->lock);
  while (h->pending != NULL || h->callbacks > 0)
    pthread_cond_wait (&h->changed, &h->lock);
  pthread_mutex_unlock (&h->lock);
  return VIX_OK;
}

EXPORT VixError
VixDiskLib_Wait (void *handle)
{
  struct handle *h = enter (handle, "VixDiskLib_Wait");

  return h == NULL ? VIX_E_INVALID_ARG : leave (h, wait_for_all (h));
}

EXPORT VixError
VixDiskLib_Flush (void *handle)
{
  struct pending p = { .type = NFC_FLUSH };
  struct handle *h = enter (handle, "VixDiskLib_Flush");

  return h == NULL ? VIX_E_INVALID_ARG : leave (h, submit_and_wait (h, &p, 0, NULL, 0));
}

static VixError
query (struct handle *h, uint64_t start, uint64_t count, uint64_t chunk, BlockList **result)
{
  struct pending p = { .type = NFC_ALLOCATED };
  uint64_t rounded, number, i, *ranges;
  BlockList *list;
  VixError error;

  if (result == NULL || chunk < MIN_CHUNK_SECTORS || count == 0 || start % chunk != 0 || count % chunk != 0
      || count / chunk > MAX_CHUNKS) {
    complain ("VixDiskLib: VixDiskLib_QueryAllocatedBlocks: %llu + %llu sectors in chunks of %llu",
              (unsigned long long) start, (unsigned long long) count, (unsigned long long) chunk);
    return VIX_E_INVALID_ARG;
  }
  /* a disk's last chunk may be a part of one */
  rounded = (h->sectors + chunk - 1) / chunk * chunk;
  if (start >= h->sectors || count > rounded - start)
    return VIX_E_OUTOFRANGE;
  if (count > h->sectors - start)
    count = h->sectors - start;
  p.length = count * SECTOR_BYTES;
  error = submit_and_wait (h, &p, start * SECTOR_BYTES, NULL, chunk * SECTOR_BYTES);
  if (error != VIX_OK)
    return error;
  number = p.buffer != NULL ? p.length / 16 : 0;
  ranges = p.buffer;
  list = calloc (1, sizeof *list + number * sizeof list->blocks[0]);
  if (list == NULL || !remember (BLOCKS, list)) {
    free (list);
    free (p.buffer);
    return VIX_E_OUT_OF_MEMORY;
  }
  list->numBlocks = number;
  for (i = 0; i < number; i++)
    list->blocks[i] = (Block) { ranges[2 * i] / SECTOR_BYTES, ranges[2 * i + 1] / SECTOR_BYTES };
  free (p.buffer);
  *result = list;
  return VIX_OK;
}

EXPORT VixError
VixDiskLib_QueryAllocatedBlocks (void *handle, uint64_t start, uint64_t count, uint64_t chunk, BlockList **result)
{
  struct handle *h = enter (handle, "VixDiskLib_QueryAllocatedBlocks");

  return h == NULL ? VIX_E_INVALID_ARG : leave (h, query (h, start, count, chunk, result));
}

EXPORT VixError
VixDiskLib_FreeBlockList (BlockList *list)
{
  if (list == NULL || !forget (BLOCKS, list, "VixDiskLib_FreeBlockList"))
    return VIX_E_INVALID_ARG;
  free (list);
  return VIX_OK;
}

/* Open and Close */

static void
free_handle (struct handle *h)
{
  if (h->fd != -1)
    close (h->fd);
  free (h->path);
  free (h->host);
  free (h->name);
  free (h->mode);
  free (h->uuid);
  free (h->parent);
  free (h->url);
  free (h->device);
  pthread_mutex_destroy (&h->lock);
  pthread_mutex_destroy (&h->send_lock);
  pthread_cond_destroy (&h->changed);
  free (h);
}

static VixError
refused_by_host (const struct handle *h, const char *why)
{
  uint32_t port = h->connection->nfc_port;

  say ("CnxOpenTCPSocket: Cannot connect to server %s:%u: %s", h->host, port, why);
  say ("CnxAuthdConnect: Returning false because CnxAuthdConnectTCP failed");
  say ("Cnx_Connect: Error message: Failed to connect to server %s:%u", h->host, port);
  complain ("[NFC ERROR] NfcNewAuthdConnectionEx: Failed to connect: Failed to connect to server %s:%u", h->host, port);
  complain ("[NFC ERROR] NfcNewAuthdConnectionEx: Failed to connect to peer. Error: Failed to connect to server %s:%u",
            h->host, port);
  say ("NBD_ClientOpen: Couldn't connect to %s:%u Failed to connect to server %s:%u", h->name, port, h->host, port);
  say ("DISKLIB-DSCPTR: : \"%s\" : Failed to open NBD extent.", h->url);
  say ("DISKLIB-LINK  : \"%s\" : failed to open (" NETWORK_CONNECT ").", h->url);
  say ("DISKLIB-CHAIN : \"%s\" : failed to open (" NETWORK_CONNECT ").", h->url);
  say ("DISKLIB-LIB   : Failed to open '%s' with flags 0x1e " NETWORK_CONNECT " (2338).", h->url);
  return VIX_E_NETWORK_CONN_REFUSED;
}

/* The data connection: greeting, ticket, answer. */
static VixError
connect_to_host (struct handle *h, const char *ticket)
{
  const struct connection *c = h->connection;
  struct timeval read_time = { settings.read_ms / 1000, settings.read_ms % 1000 * 1000 };
  struct timeval write_time = { settings.write_ms / 1000, settings.write_ms % 1000 * 1000 };
  char line[512], *answer;
  VixError error;
  unsigned number;
  int behind = 0;

  if (h->local) {
    h->fd = tcp_connect (c->server, c->port, settings.accept_ms, &error);
    if (h->fd == -1)
      return VIX_E_FAIL;
  }
  else {
    say ("NBD_ClientOpen: attempting to create connection to %s", h->url);
    h->fd = tcp_connect (h->host, c->nfc_port, settings.accept_ms, &error);
    if (h->fd == -1)
      return refused_by_host (h, strerror (errno));
    answer = receive_line (h->fd, settings.accept_ms);
    if (answer == NULL || strncmp (answer, "220 ", 4) != 0) {
      free (answer);
      return refused_by_host (h, "no greeting");
    }
    free (answer);
  }
  snprintf (line, sizeof line, "NFC %s %s %llu\r\n", ticket, h->mode,
            (unsigned long long) (settings.buffer_64k * 65536 * settings.buffer_count));
  answer = send_all (h->fd, line, strlen (line)) ? receive_line (h->fd, settings.accept_ms) : NULL;
  if (answer == NULL)
    return h->local ? VIX_E_FAIL : refused_by_host (h, "no answer");
  if (strncmp (answer, "200 ", 4) != 0) {
    error = sscanf (answer, "503 %u %n", &number, &behind) == 1 ? number : VIX_E_NETWORK_CONN_REFUSED;
    if (error == VIX_E_NETWORK_CONN_REFUSED)
      refused_by_host (h, answer + behind);
    else
      complain ("[NFC ERROR] NfcFssrvrProcessErrorMsg: received from server: %s", answer + behind);
    free (answer);
    return error;
  }
  free (answer);
  setsockopt (h->fd, SOL_SOCKET, SO_RCVTIMEO, &read_time, sizeof read_time);
  setsockopt (h->fd, SOL_SOCKET, SO_SNDTIMEO, &write_time, sizeof write_time);
  return VIX_OK;
}

/* As logs of third parties have it: with the backup NIC's address and the host's name where a NIC is tagged, and without
 * "ssl" where the wire is compressed, whatever the mode. */
static char *
url_of (const struct handle *h)
{
  const char *ssl = h->compression == NULL && strcmp (h->mode, "nbdssl") == 0 ? "ssl" : "";
  const char *compression = h->compression != NULL ? h->compression : "";
  uint32_t port = h->connection->nfc_port;
  char *url;
  int made;

  if (strcmp (h->host, h->name) == 0)
    made = asprintf (&url, "%svpxa-nfc%s://%s@%s:%u", compression, ssl, h->path, h->host, port);
  else
    made = asprintf (&url, "%svpxa-nfc%s://%s@{nfcip:%s,hostname:%s}:%u", compression, ssl, h->path, h->host, h->name,
                     port);
  return made == -1 ? NULL : url;
}

/* What vCenter says about the disk, and whom to ask for its bytes. */
static VixError
open_at_vcenter (struct handle *h, int fd, char **ticket)
{
  const struct connection *c = h->connection;
  struct text request = { 0 };
  VixError error;
  char *answer;

  text_add (&request, "{\"op\": \"open\"");
  add_field (&request, "vmx", c->vmx);
  add_field (&request, "snapshot", c->snapshot);
  add_field (&request, "transports", c->transports);
  add_field (&request, "path", h->path);
  add_field (&request, "tmp", settings.tmp);
  add_field (&request, "allow", settings.san_allow);
  add_field (&request, "deny", settings.san_deny);
  text_add (&request, h->read_only ? ", \"read_only\": true" : ", \"read_only\": false");
  answer = ask (fd, &request, &error);
  if (answer == NULL)
    return error;
  *ticket = json_string (answer, "ticket");
  h->device = json_string (answer, "device");
  h->ide = json_number (answer, "ide", 0) != 0;
  h->host = json_string (answer, "host");
  h->name = json_string (answer, "name");
  h->mode = json_string (answer, "mode");
  h->uuid = json_string (answer, "uuid");
  h->parent = json_string (answer, "parent");
  h->sectors = json_number (answer, "sectors", 0);
  h->links = json_number (answer, "links", 1);
  free (answer);
  if (*ticket == NULL || h->host == NULL || h->name == NULL || h->mode == NULL
      || h->uuid == NULL || h->parent == NULL || h->sectors == 0)
    return VIX_E_FAIL;
  h->local = strcmp (h->mode, "san") == 0 || strcmp (h->mode, "hotadd") == 0;
  if (h->local) {
    if (h->device != NULL && *h->device)
      h->url = copy (h->device);
    else if (asprintf (&h->url, "san://%s%s", c->snapshot, h->path) == -1)
      h->url = NULL;
    return h->url != NULL ? VIX_OK : VIX_E_OUT_OF_MEMORY;
  }
  h->url = url_of (h);
  return h->url != NULL ? VIX_OK : VIX_E_OUT_OF_MEMORY;
}

static VixError
open_disk (struct handle *h)
{
  char *ticket = NULL;
  VixError error;
  int fd;

  if (settings.buffer_64k * 65536 * settings.buffer_count > (16 << 20)) {
    complain ("VixDiskLib: vixDiskLib.nfcAio.Session.BufSizeIn64KB x BufCount is more than 16 MB");
    return VIX_E_INVALID;
  }
  error = log_in (h->connection, &fd);
  if (error != VIX_OK)
    return error;
  error = open_at_vcenter (h, fd, &ticket);
  if (error == VIX_OK)
    error = connect_to_host (h, ticket);
  close (fd);
  free (ticket);
  if (error != VIX_OK)
    return error;
  if (pthread_create (&h->receiver, NULL, receive, h) != 0)
    return VIX_E_OUT_OF_MEMORY;
  say ("DISKLIB-LINK  : Opened '%s' (0x%x): custom, %llu sectors / %.1f GB.", h->url, h->read_only ? 0x1e : 0xa,
       (unsigned long long) h->sectors, h->sectors * 512.0 / (1 << 30));
  say ("DISKLIB-LIB   : Opened \"%s\" (flags 0x%x, type custom).", h->url, h->read_only ? 0x1e : 0xa);
  return VIX_OK;
}

EXPORT VixError
VixDiskLib_Open (void *pointer, const char *path, uint32_t flags, void **result)
{
  const uint32_t compressions = OPEN_ZLIB | OPEN_FASTLZ | OPEN_SKIPZ;
  struct connection *c = pointer;
  struct handle *h;
  VixError error;

  if (!begin_alone ("VixDiskLib_Open"))
    return VIX_E_OBJECT_IS_BUSY;
  if (!known (CONNECTION, pointer, "VixDiskLib_Open"))
    return end_alone (VIX_E_INVALID_CONNECTION);
  if (path == NULL || result == NULL || (flags & ~(OPEN_UNBUFFERED | OPEN_SINGLE_LINK | OPEN_READ_ONLY | compressions))
      || __builtin_popcount (flags & compressions) > 1) {
    complain ("VixDiskLib: VixDiskLib_Open: flags 0x%x", flags);
    return end_alone (VIX_E_INVALID_ARG);
  }
  if (flags & OPEN_SINGLE_LINK)
    return end_alone (VIX_E_NOT_SUPPORTED);
  if (c->read_only && !(flags & OPEN_READ_ONLY)) {
    complain ("VixDiskLib: VixDiskLib_Open: the connection is for reading only");
    return end_alone (VIX_E_FILE_READ_ONLY);
  }
  h = calloc (1, sizeof *h);
  if (h == NULL)
    return end_alone (VIX_E_OUT_OF_MEMORY);
  h->connection = c;
  h->fd = -1;
  h->read_only = (flags & OPEN_READ_ONLY) != 0;
  h->compression = flags & OPEN_ZLIB ? "ZLIB-" : flags & OPEN_FASTLZ ? "FASTLZ-" : flags & OPEN_SKIPZ ? "SKIPZ-" : NULL;
  pthread_mutex_init (&h->lock, NULL);
  pthread_mutex_init (&h->send_lock, NULL);
  pthread_cond_init (&h->changed, NULL);
  h->path = copy (path);
  say ("VixDiskLib: VixDiskLib_OpenEx: Open a disk: %s, flags 0x%x.", path, flags);
  error = h->path == NULL ? VIX_E_OUT_OF_MEMORY : open_disk (h);
  if (error == VIX_OK && !remember (HANDLE, h)) {
    h->closing = true;
    shutdown (h->fd, SHUT_RDWR);
    pthread_join (h->receiver, NULL);
    error = VIX_E_OUT_OF_MEMORY;
  }
  if (error != VIX_OK) {
    say ("VixDiskLib: VixDiskLib_OpenEx: Cannot open disk %s. Error %llu (%s)%s at %d.", path,
         (unsigned long long) error, error_text (error),
         error == VIX_E_NETWORK_CONN_REFUSED ? " (DiskLib error 2338: " NETWORK_CONNECT ")" : "", __LINE__);
    free_handle (h);
    return end_alone (error);
  }
  pthread_mutex_lock (&registry);
  c->handles++;
  pthread_mutex_unlock (&registry);
  *result = h;
  return end_alone (VIX_OK);
}

EXPORT VixError
VixDiskLib_Close (void *pointer)
{
  struct pending goodbye = { .type = NFC_CLOSE };
  struct handle *h = pointer;
  struct object **at;
  VixError error = VIX_OK;

  if (!begin_alone ("VixDiskLib_Close"))
    return VIX_E_OBJECT_IS_BUSY;
  pthread_mutex_lock (&registry);
  at = look_up (HANDLE, pointer);
  if (at == NULL)
    error = VIX_E_INVALID_ARG;
  else if (h->users > 0)
    error = VIX_E_OBJECT_IS_BUSY;
  else {
    drop (at);
    h->connection->handles--;
  }
  pthread_mutex_unlock (&registry);
  if (error != VIX_OK) {
    complain ("VixDiskLib: VixDiskLib_Close: %s",
              error == VIX_E_OBJECT_IS_BUSY ? "another call runs on this handle" : "not (or no longer) an open disk");
    return end_alone (error);
  }
  wait_for_all (h);
  pthread_mutex_lock (&h->lock);
  h->closing = true;
  pthread_mutex_unlock (&h->lock);
  submit_and_wait (h, &goodbye, 0, NULL, 0); /* a connection that is lost has nothing to say goodbye to */
  shutdown (h->fd, SHUT_RDWR);
  pthread_join (h->receiver, NULL);
  say ("VixDiskLib: VixDiskLib_Close: Close disk %s.", h->path);
  free_handle (h);
  return end_alone (VIX_OK);
}

EXPORT const char *
VixDiskLib_GetTransportMode (void *handle)
{
  struct handle *h = enter (handle, "VixDiskLib_GetTransportMode");

  if (h == NULL)
    return NULL;
  leave (h, VIX_OK);
  return h->mode; /* lives as long as the handle */
}

EXPORT VixError
VixDiskLib_GetInfo (void *handle, Info **result)
{
  struct handle *h = enter (handle, "VixDiskLib_GetInfo");
  uint64_t cylinders;
  Info *info;

  if (h == NULL)
    return VIX_E_INVALID_ARG;
  if (result == NULL)
    return leave (h, VIX_E_INVALID_ARG);
  info = calloc (1, sizeof *info);
  if (info == NULL)
    return leave (h, VIX_E_OUT_OF_MEMORY);
  cylinders = h->sectors / (255 * 63);
  info->biosGeo = (Geometry) { cylinders < 65535 ? cylinders : 65535, 255, 63 };
  info->physGeo = info->biosGeo;
  info->capacity = h->sectors;
  info->adapterType = h->ide ? 1 : 3; /* 3: SCSI, LSI Logic */
  info->numLinks = h->links;
  info->uuid = copy (h->uuid);
  info->parentFileNameHint = *h->parent ? copy (h->parent) : NULL;
  info->logicalSectorSize = info->physicalSectorSize = SECTOR_BYTES;
  if (info->uuid == NULL || (*h->parent && info->parentFileNameHint == NULL) || !remember (INFO, info)) {
    free (info->uuid);
    free (info->parentFileNameHint);
    free (info);
    return leave (h, VIX_E_OUT_OF_MEMORY);
  }
  *result = info;
  return leave (h, VIX_OK);
}

EXPORT void
VixDiskLib_FreeInfo (Info *info)
{
  if (info == NULL || !forget (INFO, info, "VixDiskLib_FreeInfo"))
    return;
  free (info->uuid);
  free (info->parentFileNameHint);
  free (info);
}

EXPORT VixError
VixDiskLib_Create (void *connection, const char *path, const void *params, ProgressFunc progress, void *data)
{
  (void) connection;
  (void) path;
  (void) params;
  (void) progress;
  (void) data;
  return VIX_E_NOT_SUPPORTED; /* a remote disk is made through the API */
}

/* The access calls (VADP facts 43) */

static VixError
access_call (const ConnectParams *params, const char *function, const char *op, const char *identity)
{
  struct text request = { 0 };
  struct connection *c;
  VixError error;
  char *answer;
  int fd;

  if (identity == NULL || *identity == '\0' || strlen (identity) > 50) {
    complain ("VixDiskLib: %s: an identity has 1 to 50 characters", function);
    return VIX_E_INVALID_ARG;
  }
  error = make_connection (params, true, function, &c);
  if (error != VIX_OK)
    return error;
  error = log_in (c, &fd);
  if (error == VIX_OK) {
    text_add (&request, "{\"op\": ");
    text_add_string (&request, op);
    add_field (&request, "vmx", c->vmx);
    add_field (&request, "identity", identity);
    answer = ask (fd, &request, &error);
    free (answer);
    close (fd);
  }
  say ("VixDiskLib: %s: VM %s, identity %s: %s.", function, c->vmx, identity, error_text (error));
  free_connection (c);
  return error;
}

EXPORT VixError
VixDiskLib_PrepareForAccess (const ConnectParams *params, const char *identity)
{
  return access_call (params, "VixDiskLib_PrepareForAccess", "prepare", identity);
}

EXPORT VixError
VixDiskLib_EndAccess (const ConnectParams *params, const char *identity)
{
  return access_call (params, "VixDiskLib_EndAccess", "end", identity);
}

/* What crashed processes of the same tmpDirectory left: the disks that hotadd attached. vmxSpec may be NULL: of all VMs.
 * nbd, nbdssl and san leave nothing. */
EXPORT VixError
VixDiskLib_Cleanup (const ConnectParams *params, uint32_t *cleaned, uint32_t *remaining)
{
  struct text request = { 0 };
  struct connection *c;
  VixError error = make_connection (params, false, "VixDiskLib_Cleanup", &c);
  char *answer = NULL;
  int fd;

  if (error != VIX_OK)
    return error;
  error = log_in (c, &fd);
  if (error == VIX_OK) {
    text_add (&request, "{\"op\": \"cleanup\"");
    add_field (&request, "vmx", c->vmx);
    add_field (&request, "tmp", settings.tmp);
    answer = ask (fd, &request, &error);
    close (fd);
  }
  if (answer != NULL) {
    if (cleaned != NULL)
      *cleaned = json_number (answer, "cleaned", 0);
    if (remaining != NULL)
      *remaining = json_number (answer, "remaining", 0);
    say ("VixDiskLib: VixDiskLib_Cleanup: %u VMs cleaned up, %u remain.", (unsigned) json_number (answer, "cleaned", 0),
         (unsigned) json_number (answer, "remaining", 0));
    free (answer);
  }
  free_connection (c);
  return error;
}
