SMALL = {"rank": 16, "d_initial": 1.0}
