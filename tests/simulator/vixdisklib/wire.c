/* SPDX-License-Identifier: GPL-3.0-or-later */
/* GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt) */

/* Sockets, and as much JSON as the simulator's vCenter port speaks: one object a line. */

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "vixdisklib.h"

static void
text_add_bytes (struct text *text, const char *bytes, size_t length)
{
  if (text->failed)
    return;
  if (text->length + length + 1 > text->space) {
    size_t space = (text->length + length + 1) * 2;
    char *bigger = malloc (space);

    if (bigger == NULL) {
      text->failed = true;
      return;
    }
    if (text->bytes != NULL) {
      memcpy (bigger, text->bytes, text->length);
      explicit_bzero (text->bytes, text->length);
      free (text->bytes);
    }
    text->bytes = bigger;
    text->space = space;
  }
  memcpy (text->bytes + text->length, bytes, length);
  text->length += length;
  text->bytes[text->length] = '\0';
}

void
text_add (struct text *text, const char *bytes)
{
  text_add_bytes (text, bytes, strlen (bytes));
}

void
text_add_string (struct text *text, const char *bytes)
{
  text_add (text, "\"");
  for (; bytes != NULL && *bytes; bytes++) {
    unsigned char c = *bytes;
    char escaped[8];

    if (c == '"' || c == '\\' || c < 0x20) {
      snprintf (escaped, sizeof escaped, "\\u%04x", c);
      text_add (text, escaped);
    }
    else
      text_add_bytes (text, bytes, 1);
  }
  text_add (text, "\"");
}

void
text_free (struct text *text)
{
  if (text->bytes != NULL)
    explicit_bzero (text->bytes, text->space);
  free (text->bytes);
  memset (text, 0, sizeof *text);
}

/* A connected socket, or -1 with *error: 14008 for a name that can't be looked up, 14009 for everything else;
 * errno says which. */
int
tcp_connect (const char *host, uint32_t port, int timeout_ms, VixError *error)
{
  struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *list, *one;
  char service[16];
  int fd = -1, reason = ECONNREFUSED, on = 1;

  snprintf (service, sizeof service, "%u", port);
  if (getaddrinfo (host, service, &hints, &list) != 0) {
    *error = VIX_E_SERVER_NOT_FOUND;
    errno = EHOSTUNREACH;
    return -1;
  }
  for (one = list; one != NULL; one = one->ai_next) {
    struct pollfd wait;
    socklen_t length = sizeof reason;

    fd = socket (one->ai_family, one->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, one->ai_protocol);
    if (fd == -1) {
      reason = errno;
      continue;
    }
    if (connect (fd, one->ai_addr, one->ai_addrlen) == 0)
      reason = 0;
    else if (errno == EINPROGRESS) {
      wait = (struct pollfd) { .fd = fd, .events = POLLOUT };
      if (poll (&wait, 1, timeout_ms > 0 ? timeout_ms : -1) == 1)
        getsockopt (fd, SOL_SOCKET, SO_ERROR, &reason, &length);
      else
        reason = ETIMEDOUT;
    }
    else
      reason = errno;
    if (reason == 0)
      break;
    close (fd);
    fd = -1;
  }
  freeaddrinfo (list);
  if (fd == -1) {
    *error = VIX_E_NETWORK_CONN_REFUSED;
    errno = reason;
    return -1;
  }
  fcntl (fd, F_SETFL, fcntl (fd, F_GETFL) & ~O_NONBLOCK);
  setsockopt (fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return fd;
}

bool
send_two (int fd, const void *head, size_t head_length, const void *body, size_t body_length)
{
  struct iovec parts[2] = { { (void *) head, head_length }, { (void *) body, body_length } };
  struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };

  while (parts[0].iov_len + parts[1].iov_len > 0) {
    ssize_t sent = sendmsg (fd, &message, MSG_NOSIGNAL);
    size_t i, rest;

    if (sent == -1) {
      if (errno == EINTR)
        continue;
      return false;
    }
    rest = sent;
    for (i = 0; i < 2; i++) {
      size_t taken = rest < parts[i].iov_len ? rest : parts[i].iov_len;

      parts[i].iov_base = (char *) parts[i].iov_base + taken;
      parts[i].iov_len -= taken;
      rest -= taken;
    }
  }
  return true;
}

bool
send_all (int fd, const void *bytes, size_t length)
{
  return send_two (fd, bytes, length, NULL, 0);
}

bool
receive_all (int fd, void *bytes, size_t length)
{
  char *at = bytes;

  while (length > 0) {
    ssize_t got = recv (fd, at, length, 0);

    if (got == -1 && errno == EINTR)
      continue;
    if (got <= 0)
      return false;
    at += got;
    length -= got;
  }
  return true;
}

char *
receive_line (int fd, int timeout_ms)
{
  struct text line = { 0 };

  for (;;) {
    struct pollfd wait = { .fd = fd, .events = POLLIN };
    char c;
    ssize_t got;

    if (poll (&wait, 1, timeout_ms > 0 ? timeout_ms : -1) != 1) {
      if (errno == EINTR)
        continue;
      break;
    }
    got = recv (fd, &c, 1, 0); /* lines are few and short, and what follows one must stay */
    if (got == -1 && errno == EINTR)
      continue;
    if (got != 1)
      break;
    if (c == '\n') {
      while (line.length > 0 && line.bytes[line.length - 1] == '\r')
        line.bytes[--line.length] = '\0';
      if (line.bytes == NULL)
        text_add (&line, "");
      return line.bytes;
    }
    text_add_bytes (&line, &c, 1);
    if (line.failed || line.length > (1 << 20))
      break;
  }
  text_free (&line);
  return NULL;
}

/* JSON */

static const char *
skip_space (const char *at)
{
  return at + strspn (at, " \t");
}

/* Behind the value that begins at `at`; NULL if there is none. */
static const char *
skip_value (const char *at)
{
  unsigned depth = 0;

  at = skip_space (at);
  for (; *at; at++) {
    if (*at == '"') {
      for (at++; *at && *at != '"'; at++)
        if (*at == '\\' && at[1])
          at++;
      if (!*at)
        return NULL;
    }
    else if (*at == '{' || *at == '[')
      depth++;
    else if (*at == '}' || *at == ']') {
      if (depth == 0)
        return at;
      depth--;
    }
    else if (*at == ',' && depth == 0)
      return at;
  }
  return NULL;
}

/* Where the value of a key of the object begins. */
static const char *
find (const char *object, const char *key)
{
  const char *at = skip_space (object);
  size_t length = strlen (key);

  if (*at++ != '{')
    return NULL;
  for (;;) {
    const char *name = skip_space (at), *value;

    if (*name != '"' || (value = strchr (name + 1, ':')) == NULL)
      return NULL;
    if (strncmp (name + 1, key, length) == 0 && name[length + 1] == '"')
      return skip_space (value + 1);
    at = skip_value (value + 1);
    if (at == NULL || *at != ',')
      return NULL;
    at++;
  }
}

static char *
read_string (const char *at)
{
  struct text text = { 0 };

  if (at == NULL || *at++ != '"')
    return NULL;
  text_add (&text, "");
  for (; *at && *at != '"'; at++) {
    char c = *at;

    if (c == '\\') {
      at++;
      if (*at == 'u') {
        unsigned code = 0;
        char utf8[4];
        int count;

        if (sscanf (at + 1, "%4x", &code) != 1)
          break;
        at += 4;
        if (code < 0x80)
          count = 1, utf8[0] = (char) code;
        else if (code < 0x800)
          count = 2, utf8[0] = (char) (0xc0 | code >> 6), utf8[1] = (char) (0x80 | (code & 0x3f));
        else
          count = 3, utf8[0] = (char) (0xe0 | code >> 12), utf8[1] = (char) (0x80 | (code >> 6 & 0x3f)),
          utf8[2] = (char) (0x80 | (code & 0x3f));
        text_add_bytes (&text, utf8, count);
        continue;
      }
      c = *at == 'n' ? '\n' : *at == 't' ? '\t' : *at == 'r' ? '\r' : *at;
    }
    text_add_bytes (&text, &c, 1);
  }
  if (text.failed || *at != '"') {
    text_free (&text);
    return NULL;
  }
  return text.bytes;
}

char *
json_string (const char *object, const char *key)
{
  return read_string (find (object, key));
}

uint64_t
json_number (const char *object, const char *key, uint64_t other)
{
  const char *at = find (object, key);

  return at != NULL && *at >= '0' && *at <= '9' ? strtoull (at, NULL, 10) : other;
}

bool
json_true (const char *object, const char *key)
{
  const char *at = find (object, key);

  return at != NULL && strncmp (at, "true", 4) == 0;
}

char *
json_item (const char *object, const char *key, unsigned index)
{
  const char *at = find (object, key);

  if (at == NULL || *at != '[')
    return NULL;
  at = skip_space (at + 1);
  for (; index > 0; index--) {
    at = skip_value (at);
    if (at == NULL || *at != ',')
      return NULL;
    at = skip_space (at + 1);
  }
  return read_string (at);
}
