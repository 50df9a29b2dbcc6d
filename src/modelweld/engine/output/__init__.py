"""The directory that a merge fills: staging and publication, shards, the journal, and the files beside the weights."""
