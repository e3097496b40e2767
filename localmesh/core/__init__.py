"""The mesh in plain values: ids, records, snapshots, the pick, errors. No I/O, no protobuf, no asyncio."""
