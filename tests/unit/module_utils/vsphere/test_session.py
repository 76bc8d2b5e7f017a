# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import hashlib
import json
import socket
import ssl
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    AuthenticationError,
    ConnectionLostError,
    InputError,
    NotFoundError,
    PrivilegeError,
    TaskError,
    VsphereError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import session as session_module
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import (
    ConnectFailure,
    Connection,
    Session,
    normal_thumbprint,
)
from pyVmomi import vim, vmodl

Collector = vmodl.query.PropertyCollector


def test_password_is_not_in_repr():
    assert "secret" not in repr(Connection("vc", "user", "secret"))


# Calls


def test_read_is_one_call_and_unset_paths_are_none(session, stub, vm):
    stub.add(vm.obj, name="app01")
    assert session.read(vm.obj, "name", "config.uuid") == {"name": "app01", "config.uuid": None}
    assert stub.names() == ["RetrievePropertiesEx"]


def test_pages_are_read_to_the_end_and_from_the_start_after_a_new_login(session, stub, vm):
    def page(number, token):
        content = Collector.ObjectContent(
            obj=vim.VirtualMachine(f"vm-{number}", stub), propSet=[vmodl.DynamicProperty(name="name", val=f"n{number}")]
        )
        return Collector.RetrieveResult(objects=[content], token=token)

    stub.methods["RetrievePropertiesEx"] = [page(1, "a"), page(1, "b")]
    stub.methods["ContinueRetrievePropertiesEx"] = [vim.fault.NotAuthenticated(), page(2, "c"), page(3, None)]
    objects = [vim.VirtualMachine(f"vm-{number}", stub) for number in (1, 2, 3)]
    read = session.read_many(objects, vim.VirtualMachine, ["name"])
    assert {moid: values["name"] for moid, values in read.items()} == {"vm-1": "n1", "vm-2": "n2", "vm-3": "n3"}
    assert stub.names().count("Login") == 1
    assert [args[0] for name, _obj, args in stub.calls if name.startswith("Continue")] == ["a", "b", "c"]


def test_pages_without_an_end_are_refused(session, stub, vm):
    empty = SimpleNamespace(objects=[], token="a")
    stub.methods["RetrievePropertiesEx"] = [empty]
    stub.methods["ContinueRetrievePropertiesEx"] = lambda *_args: empty
    with pytest.raises(VsphereError, match="no end"):
        session.read_many([vm.obj], vim.VirtualMachine, ["name"])
    assert len(stub.calls) < 50


def test_expired_session_is_renewed_once_only(session, stub, vm):
    stub.methods["RefreshStorageInfo"] = [vim.fault.NotAuthenticated(), None]
    session.call(vm.obj.RefreshStorageInfo, what="x")
    assert stub.names() == ["RefreshStorageInfo", "Login", "RefreshStorageInfo"]
    stub.methods["RefreshStorageInfo"] = [vim.fault.NotAuthenticated(), vim.fault.NotAuthenticated()]
    with pytest.raises(AuthenticationError):
        session.call(vm.obj.RefreshStorageInfo, what="x")


def test_two_threads_with_an_expired_session_log_in_once(session, stub):
    seen = session.logins
    threads = [threading.Thread(target=session.renew_login, args=(seen,)) for _number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stub.names() == ["Login"]


def test_busy_is_retried_with_growing_pauses_and_ends(session, stub, vm, clock):
    stub.methods["RefreshStorageInfo"] = [vim.fault.TaskInProgress(), vim.fault.InvalidState(), None]
    session.call(vm.obj.RefreshStorageInfo, what="x")
    assert clock.sleeps == [0.5, 1.0]
    stub.methods["RefreshStorageInfo"] = [vim.fault.TaskInProgress() for _number in range(100)]
    with pytest.raises(VsphereError, match="TaskInProgress") as caught:
        session.call(vm.obj.RefreshStorageInfo, what="x", subject="VM 'app01'")
    assert caught.value.retryable
    assert clock.now < 2 * session.busy_timeout


def test_a_wrong_state_of_its_own_is_not_retried(session, stub, vm, clock):
    fault = vim.fault.InvalidPowerState(requestedState="poweredOff", existingState="poweredOn")
    stub.methods["RefreshStorageInfo"] = [fault]
    with pytest.raises(VsphereError, match="InvalidPowerState"):
        session.call(vm.obj.RefreshStorageInfo, what="x")
    assert not clock.sleeps


def test_lost_connection_repeats_only_idempotent_calls(session, stub, vm):
    stub.methods["RefreshStorageInfo"] = [ConnectionResetError("reset"), None]
    session.call(vm.obj.RefreshStorageInfo, what="x", idempotent=True)
    stub.methods["CreateSnapshot_Task"] = [ConnectionResetError("reset"), vim.Task("task-1", stub)]
    with pytest.raises(ConnectionLostError):
        session.call(vm.obj.CreateSnapshot_Task, "n", "", False, False, what="x")
    assert stub.names().count("CreateSnapshot_Task") == 1


def test_lost_for_ever_ends(session, stub, vm, clock):
    stub.methods["RefreshStorageInfo"] = [ConnectionResetError("reset") for _number in range(100)]
    with pytest.raises(VsphereError, match="reset"):
        session.call(vm.obj.RefreshStorageInfo, what="x", idempotent=True)
    assert session.reconnect_timeout <= clock.now < 2 * session.reconnect_timeout


def test_privilege_is_named(session, stub, vm):
    fault = vim.fault.NoPermission(object=vm.obj, privilegeId="VirtualMachine.State.CreateSnapshot")
    stub.methods["RefreshStorageInfo"] = [fault]
    with pytest.raises(PrivilegeError, match=r"VirtualMachine\.State\.CreateSnapshot on vm-16"):
        session.call(vm.obj.RefreshStorageInfo, what="x")


def test_an_object_that_the_server_leaves_out_is_gone(session, stub, vm):
    """A moid out of a record may be that of an object of another type, or of none."""
    other = vim.VirtualMachine("vm-99", stub)
    content = Collector.ObjectContent(obj=vm.obj, propSet=[vmodl.DynamicProperty(name="name", val="app01")])
    asked = (
        lambda: session.read(other, "name"),
        lambda: session.read_many([vm.obj, other], vim.VirtualMachine, ["name"]),
        lambda: session.read_each((vm.obj, ["name"]), (other, ["name"])),
    )
    for ask in asked:
        stub.methods["RetrievePropertiesEx"] = [Collector.RetrieveResult(objects=[content])]
        with pytest.raises(NotFoundError, match="gone: vm-99"):
            ask()


def test_unreadable_property_is_an_error_not_none(session, stub, vm):
    missing = vmodl.MissingProperty if hasattr(vmodl, "MissingProperty") else Collector.MissingProperty
    content = Collector.ObjectContent(
        obj=vm.obj, missingSet=[missing(path="config", fault=vim.fault.NoPermission(privilegeId="System.Read"))]
    )
    stub.methods["RetrievePropertiesEx"] = [Collector.RetrieveResult(objects=[content])]
    with pytest.raises(PrivilegeError, match="config"):
        session.read(vm.obj, "config")


def test_gone_object(session, vm):
    with pytest.raises(NotFoundError):
        session.read(vm.obj, "name")


def test_wrong_password(stub, clock):
    stub.methods["Login"] = [vim.fault.InvalidLogin(msg="Cannot complete login due to an incorrect user name")]
    with pytest.raises(AuthenticationError, match="incorrect user name") as caught:
        Session(Connection("vc", "user", "secret"), stub, clock=clock, sleep=clock.sleep)
    assert "secret" not in str(caught.value)


def test_an_idle_session_is_kept_alive_until_it_is_closed(stub, clock, monkeypatch):
    monkeypatch.setattr(session_module, "KEEP_ALIVE_SECONDS", 0.01)
    touched = threading.Event()
    stub.methods["CurrentTime"] = lambda *_args: touched.set()
    session = Session(Connection("vc", "user", "secret"), stub, clock=clock, sleep=clock.sleep)
    clock.now += 1
    thread = threading.Thread(target=session._keep_session_alive)
    thread.start()
    assert touched.wait(10)
    session.close()
    thread.join(10)
    assert not thread.is_alive() and stub.names()[-1] in ("Logout", "CurrentTime") and "Logout" in stub.names()


# Tasks


def add_task(stub, states, moid="task-1", **properties):
    states = list(states)

    def refresh(values):
        values["info.state"] = states.pop(0) if len(states) > 1 else states[0]

    return stub.add(vim.Task(moid, stub), refresh=refresh, **properties)


def test_wait_returns_the_result(session, stub, vm):
    task = add_task(stub, ["queued", "running", "success"], info__result=vm.obj)
    assert session.wait(task, what="x") is vm.obj
    assert len(stub.calls) == 3


def test_wait_carries_the_fault(session, stub):
    task = add_task(stub, ["error"], info__error=vim.fault.FileLocked(msg="locked", file="[a] b.vmdk"))
    with pytest.raises(TaskError, match="FileLocked") as caught:
        session.wait(task, what="x")
    assert isinstance(caught.value.fault, vim.fault.FileLocked)


def test_wait_times_out_with_few_calls(session, stub, clock):
    task = add_task(stub, ["running"])
    with pytest.raises(TaskError, match="did not end within 600 s") as caught:
        session.wait(task, what="x", timeout=600)
    assert caught.value.details["timed_out"] and clock.now == pytest.approx(600)
    assert len(stub.calls) < 150


def test_task_that_failed_busy_is_started_again(session, stub, vm):
    busy = add_task(stub, ["error"], info__error=vim.fault.TaskInProgress())
    fine = add_task(stub, ["success"], "task-2")
    stub.methods["ConsolidateVMDisks_Task"] = [busy, fine]
    session.run_task(vm.obj.ConsolidateVMDisks_Task, what="x")
    assert stub.names().count("ConsolidateVMDisks_Task") == 2


# TLS, with real certificates and sockets


@pytest.fixture
def serve(certificates):
    """Start a TLS server that answers each connection with HTTP 503."""
    listeners = []

    def start(name):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def run():
            while True:
                try:
                    raw, _peer = listener.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(raw, server_side=True) as client:
                        client.recv(4096)
                        client.sendall(b"HTTP/1.1 503 starting\r\nContent-Length: 0\r\n\r\n")
                except OSError:
                    raw.close()

        threading.Thread(target=run, daemon=True).start()
        return listener.getsockname()[1]

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def connect(port, **options):
    wanted = {"reconnect_timeout": 0, **options}
    return Session.connect(Connection("127.0.0.1", "user", "secret", port=port, **wanted))


def thumbprint(certificates, name, algorithm):
    der = ssl.PEM_cert_to_DER_cert((certificates / f"{name}.pem").read_text())
    return hashlib.new(algorithm, der).hexdigest()


@pytest.mark.parametrize(
    "name, message",
    [
        ("good", "HTTP 503"),
        ("other", "another name"),
        ("expired", "out of its time"),
        ("old", "out of its time.*has expired; besides, .*Renew the certificate"),
    ],
)
def test_certificate_is_verified_with_ca_path(serve, certificates, name, message):
    with pytest.raises(VsphereError, match=message):
        connect(serve(name), ca_path=str(certificates / "ca.pem"))


def test_unknown_authority_is_refused_and_the_remedy_is_ca_path(serve):
    with pytest.raises(AuthenticationError, match="not trusted.*ca_path"):
        connect(serve("good"))


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
def test_thumbprint_replaces_verification_and_must_match(serve, certificates, algorithm):
    right = thumbprint(certificates, "expired", algorithm)
    port = serve("expired")
    with pytest.raises(VsphereError, match="HTTP 503"):
        connect(port, validate_certs=False, thumbprint=right)
    wrong = ("0" if right[0] != "0" else "1") + right[1:]
    with pytest.raises(AuthenticationError, match="another one"):
        connect(port, validate_certs=False, thumbprint=wrong)


def test_thumbprint_is_checked_beside_verification(serve, certificates):
    with pytest.raises(AuthenticationError, match="another one"):
        connect(serve("good"), ca_path=str(certificates / "ca.pem"), thumbprint="00" * 20)


def test_refused_port_and_unknown_name():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(VsphereError, match="refused"):
        connect(port)
    with pytest.raises(VsphereError, match="can't be resolved"):
        Session.connect(Connection("nowhere.invalid", "user", "secret"))


def test_thumbprints_and_ca_path_are_checked_as_input(tmp_path):
    assert normal_thumbprint(":".join(["AB"] * 20)) == "ab" * 20
    with pytest.raises(InputError):
        normal_thumbprint("AB:CD")
    with pytest.raises(InputError, match="ca_path"):
        connect(1, ca_path=str(tmp_path / "absent.pem"))


@pytest.mark.parametrize(
    "hostname, port, words",
    [
        ("https://vcenter.example.com", 443, "without https://"),
        ("vcenter.example.com/sdk", 443, "without a path"),
        ("", 443, "empty"),
        ("a\0b", 443, "control character"),
        ("vcenter..example.com", 443, "names no server"),
        ("a" * 300, 443, "names no server"),
        ("vcenter.example.com", 0, "1 to 65535"),
        ("vcenter.example.com", 70000, "1 to 65535"),
    ],
)
def test_an_address_that_can_not_be_a_servers_is_refused(hostname, port, words):
    given = dict(username="u", password="p", reconnect_timeout=60)
    with pytest.raises(InputError, match=words):
        Connection.from_params(dict(given, hostname=hostname, port=port))


@pytest.mark.parametrize("hostname", ["vcenter", "10.0.0.1", "fe80::1%eth0", "::1", "bücher.example", "vc_1.local"])
def test_an_address_that_can_be_a_servers_is_taken(hostname):
    given = dict(username="u", password="p", port=443, reconnect_timeout=60)
    assert Connection.from_params(dict(given, hostname=hostname)).hostname == hostname


# Tasks that nobody waits for any more


def _remembered(session):
    told = []
    return told, session.remembering(told.append)


@pytest.mark.parametrize(
    ("kind", "cancelled"), [("VirtualMachine.createSnapshot", True), ("VirtualMachine.removeSnapshot", False)]
)
def test_a_task_that_is_given_up_is_remembered(session, stub, vm, kind, cancelled):
    """What makes something is cancelled; what takes something away is left to end."""
    task = add_task(stub, ["running"], info__descriptionId=kind, info__cancelable=True)
    stub.methods.update(CreateSnapshot_Task=task, CancelTask=lambda *_args: None)
    told, remembering = _remembered(session)
    with remembering, pytest.raises(TaskError, match="next vadp_recover") as caught:
        session.run_task(vm.obj.CreateSnapshot_Task, "p", "", False, False, what="x", timeout=5)
    assert caught.value.details["timed_out"] and ("CancelTask" in stub.names()) is cancelled
    assert [(item["task"], item["failed"], item["server_uuid"]) for item in told] == [(task._moId, "x", "vc-uuid")]
    assert session.on_unfinished is None
    # A module that is used alone has no record: the message says that it goes on.
    with pytest.raises(TaskError, match="still under way in vCenter"):
        session.run_task(vm.obj.CreateSnapshot_Task, "p", "", False, False, what="x", timeout=5)
    assert len(told) == 1


def test_a_task_that_ends_when_it_is_cancelled_is_forgotten(session, stub, vm):
    states = ["running", "running", "running", "error"]
    task = add_task(stub, states, info__descriptionId="VirtualMachine.createSnapshot", info__cancelable=True)
    stub.methods.update(CreateSnapshot_Task=task, CancelTask=lambda *_args: None)
    told, remembering = _remembered(session)
    with remembering, pytest.raises(TaskError, match="did not end within"):
        session.run_task(vm.obj.CreateSnapshot_Task, "p", "", False, False, what="x", timeout=0.1)
    assert told == []


def test_a_task_is_remembered_when_we_are_interrupted_or_the_server_goes(session, stub, vm):
    told = []
    for error in (KeyboardInterrupt(), ConnectionRefusedError("refused")):
        task = add_task(stub, ["running"])
        stub.methods["ReconfigVM_Task"] = task

        def interrupted(*_args, raised=error, **_options):
            raise raised

        with session.remembering(told.append), pytest.raises(
            type(error) if isinstance(error, KeyboardInterrupt) else VsphereError
        ):
            session.wait, waiting = interrupted, session.wait
            try:
                session.run_task(vm.obj.ReconfigVM_Task, vim.vm.ConfigSpec(), what="x")
            except ConnectionRefusedError as refused:
                raise VsphereError("lost") from refused
            finally:
                session.wait = waiting
    assert [item["task"] for item in told] == [task._moId] * 2


def test_what_ended_is_not_remembered(session, stub, vm):
    told, remembering = _remembered(session)
    with remembering:
        stub.methods["ReconfigVM_Task"] = add_task(stub, ["success"])
        session.run_task(vm.obj.ReconfigVM_Task, vim.vm.ConfigSpec(), what="x")
        stub.methods["ReconfigVM_Task"] = add_task(stub, ["error"], info__error=vim.fault.FileLocked(file="a"))
        with pytest.raises(TaskError):
            session.run_task(vm.obj.ReconfigVM_Task, vim.vm.ConfigSpec(), what="x")
    assert told == []


def test_a_server_that_restarts_is_waited_for_at_the_first_contact_and_at_a_login(session, stub, vm, clock):
    refused = ConnectFailure(VsphereError("The server can't be reached", reason="refused", retryable=True))
    stub.methods["RetrieveServiceContent"] = [refused, refused, session.content]
    stub.methods["Login"] = [refused, ConnectionResetError("reset"), None]
    Session(session.connection, stub, clock=clock, sleep=clock.sleep)
    assert len(clock.sleeps) == 4
    # So it is where a call meets a server that has forgotten the session and goes away again.
    stub.methods["Login"] = [refused, None]
    stub.methods["RefreshStorageInfo"] = [vim.fault.NotAuthenticated(), None]
    session.call(vm.obj.RefreshStorageInfo, what="x")
    stub.methods["Login"] = lambda *_args: (_ for _ in ()).throw(refused)
    before = clock.now
    with pytest.raises(VsphereError, match="refused"):
        session.renew_login(session.logins)
    assert session.reconnect_timeout <= clock.now - before < 2 * session.reconnect_timeout


def test_what_does_not_pass_is_not_waited_for(session, stub, clock):
    for failure in (
        ConnectFailure(VsphereError("The server can't be reached", reason="no such name")),
        vim.fault.InvalidLogin(),
        AuthenticationError("The server's certificate is not trusted"),
    ):
        stub.methods["Login"] = [failure]
        with pytest.raises(VsphereError):
            session.renew_login(session.logins)
    assert not clock.sleeps


def test_what_is_waited_for_is_shown(session, stub, clock, tmp_path):
    path = tmp_path / "progress"
    connection = replace(session.connection, progress_file=str(path))
    refused = ConnectFailure(VsphereError("The server can't be reached", reason="refused", retryable=True))
    stub.methods["Login"] = [refused, refused, None]
    Session(connection, stub, clock=clock, sleep=clock.sleep)
    (line,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert line["state"] == "waiting for the server (refused), 60 s at most" and line["label"] == connection.address


def test_a_look_at_the_inventory_is_repeated_whole_after_a_new_login(session, stub, vm):
    """A view is its session's: its reading alone would find nothing (VADP facts)."""
    views = [vim.view.ContainerView(f"view-{number}", stub) for number in range(3)]
    gone = vmodl.fault.ManagedObjectNotFound(obj=views[1])
    stub.methods["CreateContainerView"] = list(views)
    page = SimpleNamespace(objects=[Collector.ObjectContent(obj=vm.obj)], token=None)
    stub.methods["RetrievePropertiesEx"] = [vim.fault.NotAuthenticated(), page]
    stub.methods["DestroyView"] = lambda *_args: None
    assert [obj for obj, _values in session.find(vim.VirtualMachine, ["name"])] == [vm.obj]
    assert stub.names().count("CreateContainerView") == 2 and stub.names().count("Login") == 1
    # Another thread logged in again between the two.
    stub.methods["CreateContainerView"] = views[1:]
    stub.methods["RetrievePropertiesEx"] = [gone, page]
    assert session.find(vim.VirtualMachine, ["name"])
