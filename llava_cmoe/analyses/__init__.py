"""What a finished run tells when it is asked: unseen inputs, probes, expert similarity, reproduction, throughput."""
