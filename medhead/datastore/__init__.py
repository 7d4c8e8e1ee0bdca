"""Datastore of the user's own text for the proposer `ngram` (REST, He et al. 2024); `medhead datastore` builds one."""

from medhead.datastore.build import build_datastore
from medhead.datastore.store import Datastore, vocabulary_fingerprint

__all__ = ["Datastore", "build_datastore", "vocabulary_fingerprint"]
