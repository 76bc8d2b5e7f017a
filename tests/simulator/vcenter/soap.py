# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""SOAP 1.1 on pyVmomi's type metadata: any request into values, any value or fault into a response.

Requests are decoded by the declared types, so that a client which sends what vSphere would not understand gets
``InvalidRequest``. Responses fill in mandatory fields that nobody set: clients generated from the WSDL rely on them.
"""

from __future__ import annotations

import base64
import functools
from datetime import datetime, timezone
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from pyVmomi import Iso8601, VmomiSupport, vim, vmodl
from pyVmomi.VmomiSupport import (
    F_OPTIONAL,
    DataObject,
    Enum,
    ManagedMethod,
    ManagedObject,
    PropertyPath,
    binary,
)

VERSION = "vim.version.v8_0_3_0"
NAMESPACE = "urn:vim25"
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

_ENVELOPE = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<soapenv:Envelope xmlns:soapenc="http://schemas.xmlsoap.org/soap/encoding/"'
    ' xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/"'
    ' xmlns:xsd="http://www.w3.org/2001/XMLSchema" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">\n'
    "<soapenv:Body>\n"
)
_END = "\n</soapenv:Body>\n</soapenv:Envelope>"

# xsd names of what may stand in an element of type Any
_XSD = {
    "string": str,
    "boolean": bool,
    "byte": VmomiSupport.byte,
    "short": VmomiSupport.short,
    "int": int,
    "integer": int,
    "long": VmomiSupport.long,
    "float": float,
    "double": VmomiSupport.double,
    "dateTime": datetime,
    "base64Binary": binary,
    "anyURI": VmomiSupport.URI,
    "anyType": object,
}


def invalid_request(text: str) -> Exception:
    return vmodl.fault.InvalidRequest(msg=text)


def version_of(soap_action: str) -> str:
    """The version a client speaks, out of its SOAPAction; unknown and newer ones are answered in ours."""
    uri = soap_action.strip().strip('"')
    try:
        version = VmomiSupport.GetVersionFromVersionUri(uri)
    except KeyError:
        return VERSION
    return version if VmomiSupport.IsChildVersion(VERSION, version) else VERSION


def service_versions() -> bytes:
    """The body of /sdk/vimServiceVersions.xml."""
    prior = [
        VmomiSupport.versionIdMap[version]
        for version in VmomiSupport.GetServiceVersions("vim25")
        if version != VERSION and VmomiSupport.IsChildVersion(VERSION, version) and version.startswith("vim.version.")
    ]
    text = (
        '<?xml version="1.0" encoding="UTF-8" ?>\n<namespaces version="1.0"><namespace>'
        f"<name>{NAMESPACE}</name><version>{VmomiSupport.versionIdMap[VERSION]}</version><priorVersions>"
        + "".join(f"<version>{version}</version>" for version in prior if version)
        + "</priorVersions></namespace></namespaces>\n"
    )
    return text.encode()


@functools.lru_cache(maxsize=None)
def type_by_name(name: str) -> Any:
    """The type of an ``xsi:type`` or ``type`` attribute without its prefix.

    :raises InvalidRequest: no such type.
    """
    if name in _XSD:
        return _XSD[name]
    if name.endswith("ManagedObjectReference"):
        name = name[: -len("Reference")]
    try:
        return VmomiSupport.GuessWsdlType(name)
    except KeyError:
        raise invalid_request(f"Unknown type: {name}") from None


# --- requests -------------------------------------------------------------------------------------------------------


class Request:
    """One decoded call: the method's description, the object's type and moid, the arguments by name."""

    def __init__(self, method: str, this_type: str, this_moid: str, info: Any, arguments: dict[str, Any]) -> None:
        self.method = method
        self.this_type = this_type
        self.this_moid = this_moid
        self.info = info  # pyVmomi's method info; None when there is no such method
        self.arguments = arguments


def decode_request(body: bytes) -> Request:
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise invalid_request(f"XML document is not well formed: {error}") from None
    envelope_body = next((child for child in root if _local(child.tag) == "Body"), None)
    if envelope_body is None or not len(envelope_body):
        raise invalid_request("SOAP body not found")
    call = envelope_body[0]
    method = _local(call.tag)
    this = next((child for child in call if _local(child.tag) == "_this"), None)
    if this is None:
        raise invalid_request("Required parameter _this is missing")
    this_type = _attribute(this, "type") or ""
    this_moid = (this.text or "").strip()
    if method in ("Fetch", "FetchEx"):
        names = [child.text or "" for child in call if _local(child.tag) == "prop"]
        return Request("Fetch", this_type, this_moid, None, {"prop": names[0] if names else ""})
    info = _method_info(_namespace(call.tag), method)
    if info is None:
        return Request(method, this_type, this_moid, None, {})
    arguments: dict[str, Any] = {}
    parameters = {param.name: param for param in info.params}
    for child in call:
        name = _local(child.tag)
        if name == "_this":
            continue
        if name not in parameters:
            raise invalid_request(f"Unexpected element <{name}> in {method}")
        declared = parameters[name].type
        if issubclass(declared, list):
            arguments.setdefault(name, declared()).extend(_decode_into_list(child, declared))
        else:
            arguments[name] = decode(child, declared)
    for name, param in parameters.items():
        if name in arguments:
            continue
        if not param.flags & F_OPTIONAL and not issubclass(param.type, list):
            raise invalid_request(f"Required parameter {name} is missing")
        arguments[name] = param.type() if issubclass(param.type, list) else None
    return Request(method, this_type, this_moid, info, arguments)


@functools.lru_cache(maxsize=None)
def _method_info(namespace: str, name: str) -> Any:
    for candidate in (namespace, NAMESPACE):
        try:
            return VmomiSupport.GetWsdlMethod(candidate, name).info
        except KeyError:
            continue
    return None


def _local(tag: str) -> str:
    return tag.rsplit("}", 1)[-1]


def _namespace(tag: str) -> str:
    return tag[1:].split("}", 1)[0] if tag.startswith("{") else ""


def _attribute(element: ElementTree.Element, name: str) -> str | None:
    """An attribute without a namespace."""
    value = element.attrib.get(name)
    return value.rsplit(":", 1)[-1] if value is not None else None


def _xsi_type(element: ElementTree.Element) -> str | None:
    value = element.attrib.get("{http://www.w3.org/2001/XMLSchema-instance}type")
    return value.strip().rsplit(":", 1)[-1] if value is not None else None


def _dynamic(declared: Any) -> bool:
    return declared is ManagedMethod or declared is PropertyPath or declared is type


def _decode_into_list(element: ElementTree.Element, declared: Any) -> list[Any]:
    """One element of a list field: an item, or (inside Any) a whole ``ArrayOf...``."""
    name = _xsi_type(element)
    if name and name.startswith("ArrayOf"):
        return decode(element, declared)
    return [decode(element, declared.Item)]


def decode(element: ElementTree.Element, declared: Any) -> Any:
    """The value of an element; *declared* is the field's type, ``xsi:type`` may narrow it."""
    name = _xsi_type(element)
    actual = declared
    if name and not _dynamic(declared):
        actual = type_by_name(name)
        if declared is not object and not issubclass(actual, declared) and _narrows_wrongly(actual, declared):
            raise invalid_request(f"<{_local(element.tag)}>: {name} is not a {VmomiSupport.GetWsdlName(declared)}")
    text = element.text or ""
    if _dynamic(actual):
        return _decode_dynamic(actual, text.strip().rsplit(":", 1)[-1])
    if issubclass(actual, ManagedObject):
        kind = _attribute(element, "type")
        moid = text.strip()
        return (type_by_name(kind) if kind else actual)(moid)
    if issubclass(actual, list):
        result = actual()
        for child in element:
            result.append(decode(child, actual.Item))
        return result
    if issubclass(actual, DataObject):
        return _decode_object(element, actual)
    return _decode_simple(element, actual, text)


def _narrows_wrongly(actual: Any, declared: Any) -> bool:
    if issubclass(actual, ManagedObject) and issubclass(declared, ManagedObject):
        return False
    simple = (bool, int, float, str, datetime, binary)
    return not any(issubclass(actual, kind) and issubclass(declared, kind) for kind in simple)


def _decode_dynamic(actual: Any, text: str) -> Any:
    if actual is type:
        return type_by_name(text)
    return text


def _decode_object(element: ElementTree.Element, actual: Any) -> Any:
    result = actual()
    for child in element:
        name = _local(child.tag)
        try:
            info = result._GetPropertyInfo(name)
        except AttributeError:
            raise invalid_request(f"Unexpected element <{name}> in {VmomiSupport.GetWsdlName(actual)}") from None
        try:
            if issubclass(info.type, list):
                getattr(result, name).extend(_decode_into_list(child, info.type))
            else:
                setattr(result, name, decode(child, info.type))
        except TypeError as error:
            raise invalid_request(f"<{name}>: {error}") from None
    return result


def _decode_simple(element: ElementTree.Element, actual: Any, text: str) -> Any:
    tag = _local(element.tag)
    stripped = text.strip()
    try:
        if actual is bool:
            if stripped in ("true", "1"):
                return True
            if stripped in ("false", "0"):
                return False
            raise ValueError(stripped)
        if issubclass(actual, Enum):
            if stripped not in actual.values:
                raise ValueError(stripped)
            return getattr(actual, stripped)
        if actual is datetime:
            value = Iso8601.ParseISO8601(stripped)
            if value is None:
                raise ValueError(stripped)
            return value
        if issubclass(actual, binary):
            return binary(base64.b64decode(stripped))
        if actual is object:
            return text
        if issubclass(actual, str):
            return actual(text)
        return actual(stripped)
    except ValueError as error:
        raise invalid_request(f"<{tag}>: not a {VmomiSupport.GetWsdlName(actual)}: {error}") from None


# --- responses ------------------------------------------------------------------------------------------------------


def encode_response(method: str, value: Any, result_type: Any, version: str) -> bytes:
    out = [_ENVELOPE, f'<{method}Response xmlns="{NAMESPACE}">']
    if value is not None:
        if issubclass(result_type, list):
            encode_list(out, "returnval", value, result_type.Item, version)
        else:
            encode(out, "returnval", value, result_type, version)
    out.append(f"</{method}Response>{_END}")
    return "".join(out).encode("utf-8", "xmlcharrefreplace")


def encode_fault(fault: Any, version: str) -> bytes:
    name = VmomiSupport.GetWsdlName(type(fault))
    message = fault.msg or default_message(fault)
    out = [
        _ENVELOPE,
        "<soapenv:Fault><faultcode>ServerFaultCode</faultcode>",
        f"<faultstring>{_text(message)}</faultstring><detail>",
    ]
    _encode_object(out, f"{name}Fault", fault, type(fault), version, f' xmlns="{NAMESPACE}" xsi:type="{name}"', False)
    out.append(f"</detail></soapenv:Fault>{_END}")
    return "".join(out).encode("utf-8", "xmlcharrefreplace")


_MESSAGES = {
    "NotAuthenticated": "The session is not authenticated.",
    "NoPermission": "Permission to perform this operation was denied.",
    "InvalidLogin": "Cannot complete login due to an incorrect user name or password.",
    "InvalidState": "The operation is not allowed in the current state.",
    "InvalidPowerState": "The attempted operation cannot be performed in the current state (Powered on).",
    "TaskInProgress": "Another task is already in progress.",
    "ManagedObjectNotFound": "The object has already been deleted or has not been completely created",
    "NotSupported": "The operation is not supported on the object.",
    "FileLocked": "Unable to access file since it is locked",
    "NotFound": "The object or item referred to could not be found.",
    "RequestCanceled": "The task was canceled by a user.",
}


def default_message(fault: Any) -> str:
    name = VmomiSupport.GetWsdlName(type(fault))
    if name == "InvalidArgument":
        return f"A specified parameter was not correct: {fault.invalidProperty or ''}"
    if name in ("FileNotFound", "FileFault", "CannotAccessFile", "FileLocked", "FileAlreadyExists") and fault.file:
        verb = {
            "FileNotFound": "was not found",
            "FileLocked": "is locked",
            "FileAlreadyExists": "already exists",
        }.get(name, "cannot be accessed")
        return f"File {fault.file} {verb}"
    return _MESSAGES.get(name, f"A general system error occurred: {name}")


def encode_list(out: list[str], tag: str, values: Any, item: Any, version: str) -> None:
    for value in values:
        encode(out, tag, value, item, version)


def encode(out: list[str], tag: str, value: Any, declared: Any, version: str, attributes: str = "") -> None:
    """Append one element. *declared* is the type the schema gives the field; ``object`` is Any."""
    any_type = declared is object
    if isinstance(value, DataObject):
        if isinstance(value, Exception) and not isinstance(value, vmodl.LocalizedMethodFault):
            _encode_localized_fault(out, tag, value, declared, version, attributes)
            return
        actual = VmomiSupport.GetCompatibleType(type(value), version)
        if actual is not declared:
            attributes += f' xsi:type="{VmomiSupport.GetWsdlName(actual)}"'
        _encode_object(out, tag, value, actual, version, attributes, True)
    elif isinstance(value, ManagedObject):
        if any_type:
            attributes += ' xsi:type="ManagedObjectReference"'
        out.append(f'<{tag}{attributes} type="{VmomiSupport.GetWsdlName(type(value))}">{_text(value._moId)}</{tag}>')
    elif isinstance(value, list):
        _encode_array(out, tag, value, version, attributes)
    elif isinstance(value, bool):
        attributes += ' xsi:type="xsd:boolean"' if any_type else ""
        out.append(f"<{tag}{attributes}>{'true' if value else 'false'}</{tag}>")
    elif isinstance(value, datetime):
        attributes += ' xsi:type="xsd:dateTime"' if any_type else ""
        out.append(f"<{tag}{attributes}>{Iso8601.ISO8601Format(value)}</{tag}>")
    elif isinstance(value, (binary, bytes)):
        attributes += ' xsi:type="xsd:base64Binary"' if any_type else ""
        out.append(f"<{tag}{attributes}>{base64.b64encode(value).decode()}</{tag}>")
    elif isinstance(value, (int, float)):
        attributes += f' xsi:type="xsd:{_number_name(value)}"' if any_type else ""
        out.append(f"<{tag}{attributes}>{value}</{tag}>")
    elif isinstance(value, type):
        attributes += ' xsi:type="xsd:string"' if any_type else ""
        out.append(f"<{tag}{attributes}>{VmomiSupport.GetWsdlName(value)}</{tag}>")
    elif isinstance(value, ManagedMethod):
        attributes += ' xsi:type="xsd:string"' if any_type else ""
        out.append(f"<{tag}{attributes}>{value.info.wsdlName}</{tag}>")
    else:
        if any_type:
            name = VmomiSupport.GetWsdlName(type(value)) if isinstance(value, Enum) else "xsd:string"
            attributes += f' xsi:type="{name}"'
        out.append(f"<{tag}{attributes}>{_text(str(value))}</{tag}>")


def encoded(value: Any, version: str = VERSION) -> str:
    """The value as it would stand inside Any; what two values are compared by."""
    out: list[str] = []
    encode(out, "val", value, object, version)
    return "".join(out)


def _number_name(value: Any) -> str:
    if isinstance(value, float):
        return "double" if isinstance(value, VmomiSupport.double) else "float"
    for kind, name in ((VmomiSupport.byte, "byte"), (VmomiSupport.short, "short"), (VmomiSupport.long, "long")):
        if value.__class__ is kind:
            return name
    return "int" if -(2**31) <= value < 2**31 else "long"


def _encode_array(out: list[str], tag: str, value: Any, version: str, attributes: str) -> None:
    """A list inside Any: typed ``ArrayOf<element>``, each item named by the element type."""
    item = getattr(value, "Item", None)
    if item is None:
        raise TypeError(f"an untyped list can't stand in Any: {value!r}")
    if _dynamic(item):
        item_tag, array = "string", "ArrayOfString"
    elif issubclass(item, ManagedObject):
        item_tag, array = "ManagedObjectReference", "ArrayOfManagedObjectReference"
    elif issubclass(item, Enum):
        item_tag, array = VmomiSupport.GetWsdlName(item), "ArrayOf" + VmomiSupport.GetWsdlName(item)
    else:
        name = VmomiSupport.GetWsdlName(item)
        item_tag, array = name, "ArrayOf" + name[0].upper() + name[1:]
    out.append(f'<{tag}{attributes} xsi:type="{array}">')
    for one in value:
        encode(out, item_tag, one, item, version)
    out.append(f"</{tag}>")


def _encode_localized_fault(out: list[str], tag: str, fault: Any, declared: Any, version: str, attributes: str) -> None:
    if declared is object:
        attributes += ' xsi:type="LocalizedMethodFault"'
    name = VmomiSupport.GetWsdlName(type(fault))
    out.append(f"<{tag}{attributes}>")
    _encode_object(out, "fault", fault, type(fault), version, f' xsi:type="{name}"', False)
    out.append(f"<localizedMessage>{_text(fault.msg or default_message(fault))}</localizedMessage></{tag}>")


@functools.lru_cache(maxsize=None)
def _fields(actual: Any, version: str) -> tuple[tuple[str, Any, bool], ...]:
    return tuple(
        (info.name, info.type, bool(info.flags & F_OPTIONAL))
        for info in actual._GetPropertyList()
        if VmomiSupport.IsChildVersion(version, info.version)
    )


def _encode_object(
    out: list[str], tag: str, value: Any, actual: Any, version: str, attributes: str, with_message: bool
) -> None:
    out.append(f"<{tag}{attributes}>")
    for name, declared, optional in _fields(actual, version):
        field = getattr(value, name)
        if name == "msg" and not with_message and isinstance(value, Exception):
            continue  # the message of a fault stands beside it, in faultstring or localizedMessage
        if field is None:
            if optional:
                continue
            field = filler(declared)
            if field is None:
                continue
        if isinstance(field, list) and declared is not object:
            encode_list(out, name, field, declared.Item, version)
        else:
            encode(out, name, field, declared, version)
    out.append(f"</{tag}>")


def filler(declared: Any) -> Any:
    """Something valid for a mandatory field that nobody set; None where nothing can be made up."""
    if declared is object:
        return ""
    if declared is datetime:
        return EPOCH
    if declared is bool:
        return False
    if _dynamic(declared) or issubclass(declared, (ManagedObject, list)):
        return None
    if issubclass(declared, Enum):
        return declared.values[0]
    if issubclass(declared, DataObject):
        return declared()
    if issubclass(declared, binary):
        return binary(b"")
    return declared(0) if issubclass(declared, (int, float)) else declared("")


def _text(value: str) -> str:
    # What XML 1.0 can't hold at all would make the whole answer unreadable.
    return escape("".join(ch for ch in value if ch >= " " or ch in "\t\n\r"), {"\r": "&#13;"})


def array(item: Any, values: Any = ()) -> Any:
    """A typed list, as it must be where it stands in Any."""
    name = {str: "string[]", int: "int[]", bool: "boolean[]", type: "vmodl.TypeName[]"}.get(item)
    result = VmomiSupport.GetVmodlType(name)() if name else item.Array()
    result.extend(values)
    return result


__all__ = [
    "EPOCH",
    "NAMESPACE",
    "VERSION",
    "Request",
    "array",
    "decode",
    "decode_request",
    "default_message",
    "encode_fault",
    "encode_response",
    "encoded",
    "invalid_request",
    "service_versions",
    "type_by_name",
    "version_of",
    "vim",
]
