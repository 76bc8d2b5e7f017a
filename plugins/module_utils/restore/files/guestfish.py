from __future__ import annotations
from .reader import FileReader
class GuestfishReader(FileReader):
    name = "guestfish"
    @staticmethod
    def missing():
        return ["guestfish"]
