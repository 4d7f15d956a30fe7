"""From bytes in tar shards to uint8 batches, in an order that is a pure function of the seed."""
