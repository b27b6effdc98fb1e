"""The numbers of the paper's Tables 1, 2 and 3 (Sec. 5), and how each of their rows is trained and sampled here."""
from typing import NamedTuple

PAPER_COLUMNS = ("PSNR", "SSIM", "LPIPS", "FID_B", "KID_B", "FID_I", "KID_I", "CLIP")

# Table 1, texturing
PAPER1 = {
    "syn only":                   (25.76, .9269, .0831, 168.21, .0240, 218.29, .0431, .2628),
    "syn + real":                 (25.63, .9260, .0833, 164.37, .0226, 214.84, .0411, .2629),
    "LoRA 32":                    (21.88, .9012, .1027, 151.97, .0157, 204.80, .0324, .2682),
    "LoRA 128":                   (22.12, .9033, .1014, 155.65, .0168, 207.69, .0339, .2680),
    "linear adapters 32":         (22.49, .9069, .0959, 154.16, .0186, 210.44, .0372, .2678),
    "linear adapters 128":        (22.87, .9088, .0967, 156.07, .0189, 213.50, .0379, .2671),
    "SDEdit":                     (22.21, .9013, .1169, 147.06, .0149, 204.35, .0327, .2672),
    "domain adapter 32":          (25.61, .9266, .0843, 164.17, .0223, 215.80, .0408, .2610),
    "domain adapter 128":         (25.60, .9264, .0848, 163.64, .0220, 215.28, .0398, .2608),
    "spatial adapter 32":         (24.91, .9200, .0858, 155.71, .0197, 210.62, .0393, .2634),
    "spatial adapter 128":        (24.86, .9198, .0863, 153.35, .0181, 208.64, .0343, .2636),
    "domain switcher, two-stage": (24.94, .9193, .0888, 157.89, .0185, 210.18, .0350, .2644),
    "domain switcher, joint":     (23.16, .9069, .0991, 145.48, .0156, 205.08, .0335, .2663),
    "Realiz3D":                   (24.78, .9153, .0865, 141.90, .0121, 200.24, .0291, .2674),
}
# Table 2, ablation (texturing)
PAPER2 = {
    "1 joint":                    (25.53, .9267, .0850, 166.93, .0234, 216.63, .0424, .2624),
    "2 no real data":             (25.11, .9232, .0849, 162.02, .0220, 212.86, .0395, .2656),
    "3 real data":                (23.97, .9123, .0897, 137.23, .0098, 198.44, .0258, .2695),
    "4 = 3, shifted":             (24.25, .9128, .0883, 141.99, .0123, 202.07, .0293, .2679),
    "5 = 3 + reassignment":       (24.18, .9125, .0877, 139.21, .0102, 198.71, .0265, .2678),
    "6 = 5, shifted":             (24.37, .9130, .0871, 141.08, .0117, 199.33, .0289, .2670),
    "7 = 5 + freezing":           (24.52, .9141, .0870, 141.20, .0118, 199.39, .0290, .2675),
    "8 = 7, shifted":             (24.78, .9153, .0865, 141.90, .0121, 200.24, .0291, .2674),
}
# Table 3, text to multiview
PAPER3 = {
    "syn only":                   (19.66, .8779, .0964, 168.60, .0204, 215.57, .0363, .2541),
    "syn + real":                 (19.37, .8714, .1017, 164.44, .0192, 214.72, .0361, .2586),
    "LoRA 32":                    (17.54, .8548, .1222, 153.89, .0125, 204.14, .0264, .2563),
    "LoRA 128":                   (17.91, .8568, .1186, 154.11, .0131, 206.68, .0269, .2579),
    "linear adapters 32":         (18.07, .8603, .1223, 152.21, .0127, 204.02, .0256, .2583),
    "linear adapters 128":        (18.38, .8690, .1191, 155.40, .0150, 208.78, .0313, .2526),
    "SDEdit":                     (18.46, .8431, .1232, 139.18, .0112, 199.67, .0263, .2609),
    "TRELLIS large":              (None, None, None, 181.92, .0275, 224.22, .0441, .2495),
    "domain adapter 32":          (19.27, .8655, .1076, 158.52, .0164, 212.00, .0308, .2607),
    "domain adapter 128":         (19.02, .8621, .1082, 157.45, .0163, 210.67, .0313, .2601),
    "spatial adapter 32":         (18.48, .8422, .1216, 132.48, .0072, 200.38, .0212, .2633),
    "spatial adapter 128":        (18.36, .8350, .1234, 130.25, .0071, 199.46, .0205, .2638),
    "domain switcher, two-stage": (18.56, .8481, .1134, 153.36, .0146, 208.14, .0303, .2587),
    "domain switcher, joint":     (17.67, .8010, .1290, 129.56, .0061, 197.11, .0180, .2629),
    "Realiz3D":                   (19.02, .8631, .1075, 122.01, .0056, 196.01, .0171, .2643),
}

# ---------------------------------------------------------------------------------------------------------------------
# How the rows are made on the toy world


class Row(NamedTuple):
    """A row of a table: how to train and sample it, and what the paper measured."""
    label: str
    flags: str | None       # of train_stage2.py; None: the paper's numbers only
    mode: str               # domain mode of sampling, or "sdedit"
    paper: tuple            # a number for each of PAPER_COLUMNS


# The paper's ranks 32 and 128 at width 1152 are 5 and 21 at the toy's 192.
BASELINES = {               # flags and mode
    "syn only":                   ("--method syn_only", "real"),
    "syn + real":                 ("--method syn_real", "real"),
    "LoRA 32":                    ("--method lora --rank 5", "real"),
    "LoRA 128":                   ("--method lora --rank 21", "real"),
    "linear adapters 32":         ("--method linear_adapter --rank 5", "real"),
    "linear adapters 128":        ("--method linear_adapter --rank 21", "real"),
    "SDEdit":                     ("--method syn_only", "sdedit"),
    "TRELLIS large":              (None, "real"),
    "domain adapter 32":          ("--method domain_adapter --rank 5", "real"),
    "domain adapter 128":         ("--method domain_adapter --rank 21", "real"),
    "spatial adapter 32":         ("--method spatial_adapter --rank 5", "real"),
    "spatial adapter 128":        ("--method spatial_adapter --rank 21", "real"),
    "domain switcher, two-stage": ("--method domain_switcher", "real"),
    "domain switcher, joint":     ("--method domain_switcher --joint", "real"),
    "Realiz3D":                   ("", "shifted"),
}
PLAIN = "--no_freezing --no_reassignment"
ABLATIONS = {
    "1 joint":                    (f"--joint {PLAIN}", "real"),
    "2 no real data":             ("--no_real_data", "real"),
    "3 real data":                (PLAIN, "real"),
    "4 = 3, shifted":             (PLAIN, "shifted"),
    "5 = 3 + reassignment":       ("--no_freezing", "real"),
    "6 = 5, shifted":             ("--no_freezing", "shifted"),
    "7 = 5 + freezing":           ("", "real"),
    "8 = 7, shifted":             ("", "shifted"),
}
TABLES = {                  # name: (task, rows)
    "table1": ("texturing", [Row(label, *BASELINES[label], paper) for label, paper in PAPER1.items()]),
    "table2": ("texturing", [Row(label, *ABLATIONS[label], paper) for label, paper in PAPER2.items()]),
    "table3": ("text", [Row(label, *BASELINES[label], paper) for label, paper in PAPER3.items()]),
}
