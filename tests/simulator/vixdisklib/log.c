/* SPDX-License-Identifier: GPL-3.0-or-later */
/* GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt) */

#include <stdio.h>
#include <stdlib.h>

#include "vixdisklib.h"

LogFunc *log_function, *warn_function;

static void
call (LogFunc *function, const char *format, ...)
{
  va_list args;

  va_start (args, format);
  function (format, args);
  va_end (args);
}

static void
print (LogFunc *function, const char *format, va_list args)
{
  char line[4096];

  if (function == NULL)
    return;
  vsnprintf (line, sizeof line, format, args);
  call (function, "%s\n", line);
}

void
say (const char *format, ...)
{
  va_list args;

  va_start (args, format);
  print (log_function, format, args);
  va_end (args);
}

/* What the real library prints through its warning function; nbdkit shows these without -v. */
void
complain (const char *format, ...)
{
  va_list args;

  va_start (args, format);
  print (warn_function, format, args);
  va_end (args);
}

const char *
error_text (VixError error)
{
  static const struct {
    unsigned number;
    const char *text;
  } known[] = {
    { VIX_OK, "The operation was successful" },
    { VIX_E_FAIL, "Unknown error" },
    { VIX_E_OUT_OF_MEMORY, "Memory allocation failed. Out of memory." },
    { VIX_E_INVALID_ARG, "One of the parameters was invalid" },
    { VIX_E_FILE_NOT_FOUND, "A file was not found" },
    { VIX_E_OBJECT_IS_BUSY, "This function cannot be performed because the handle is executing another function" },
    { VIX_E_NOT_SUPPORTED, "The operation is not supported" },
    { VIX_E_DISK_FULL, "The disk is full" },
    { VIX_E_FILE_READ_ONLY, "The file is write-protected" },
    { VIX_E_FILE_ACCESS_ERROR, "You do not have access rights to this file" },
    { VIX_E_FILE_ALREADY_LOCKED, "The file is already in use" },
    { VIX_E_HOST_USER_PERMISSIONS, "Insufficient permissions in the host operating system" },
    { VIX_E_VM_NOT_FOUND, "The virtual machine cannot be found" },
    { VIX_E_SERVER_NOT_FOUND, "The server name could not be resolved" },
    { VIX_E_NETWORK_CONN_REFUSED, "The server refused connection" },
    { VIX_E_TCP_SOCKET_ERROR, "There was an error in communication" },
    { VIX_E_TCP_CONN_LOST, "The connection was lost" },
    { VIX_E_SERVER_NOT_AVAILABLE, "The server is not available" },
    { VIX_E_INVALID, "One of the parameters was invalid" },
    { VIX_E_OUTOFRANGE, "Out of range" },
    { VIX_E_SUBSYSTEM_INIT_FAIL, "The initialization of a subsystem failed" },
    { VIX_E_INVALID_CONNECTION, "The connection is invalid" },
    { VIX_E_NOLICENSE, "The host is not licensed for this feature" },
    { VIX_E_CANNOT_CONNECT_TO_HOST, "Cannot connect to host" },
    { VIX_ASYNC, "The operation was accepted" },
  };
  size_t i;

  for (i = 0; i < sizeof known / sizeof known[0]; i++)
    if (known[i].number == (error & 0xffff))
      return known[i].text;
  return "Unknown error";
}
