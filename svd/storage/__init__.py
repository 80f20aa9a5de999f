"""Files on this machine, objects in S3 and files on web servers behind one interface."""

from svd.storage.files import Entry as Entry
from svd.storage.files import Location as Location
from svd.storage.files import RangedReader as RangedReader
from svd.storage.files import Truncated as Truncated
from svd.storage.files import copy as copy
from svd.storage.files import delete as delete
from svd.storage.files import download as download
from svd.storage.files import exists as exists
from svd.storage.files import is_remote as is_remote
from svd.storage.files import join as join
from svd.storage.files import link as link
from svd.storage.files import list_files as list_files
from svd.storage.files import local_path as local_path
from svd.storage.files import open_read as open_read
from svd.storage.files import read_bytes as read_bytes
from svd.storage.files import read_range as read_range
from svd.storage.files import sha256 as sha256
from svd.storage.files import size as size
from svd.storage.files import split_uri as split_uri
from svd.storage.files import stored_sha256 as stored_sha256
from svd.storage.files import upload as upload
from svd.storage.files import version as version
from svd.storage.files import write_bytes as write_bytes
