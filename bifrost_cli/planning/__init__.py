"""plan and doctor: parameters, memory, disk and time before anything is loaded."""
