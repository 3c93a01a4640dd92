"""Which task an input comes from, decided on frozen features alone, without being told the task."""
