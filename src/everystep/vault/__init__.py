"""What lies on disk: packs, manifests, logs and tags; chunks in, verified chunks out."""

from everystep.codecs import NAMES as CODEC_NAMES
from everystep.vault.history import Committed, History
from everystep.vault.log import Log
from everystep.vault.manifest import Manifest, PartView, Spot, read_manifest
from everystep.vault.names import PackName, run_folder, run_name
from everystep.vault.packs import PackWriter, Uploads
from everystep.vault.place import Place
from everystep.vault.run import RunVault, Term

__all__ = [
    "CODEC_NAMES",
    "Committed",
    "History",
    "Log",
    "Manifest",
    "PackName",
    "PackWriter",
    "PartView",
    "Place",
    "RunVault",
    "Spot",
    "Term",
    "Uploads",
    "read_manifest",
    "run_folder",
    "run_name",
]
