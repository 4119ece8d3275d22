"""Formats that laboratories have and this server does not read, so that a refusal names them and the way out."""

from typing import NamedTuple


class Neighbour(NamedTuple):
    """A format that is recognised only to be refused.

    Attributes:
        start: Byte at which `magic` lies.
        magic: Bytes by which the format is recognised.
        name: Name of the format.
        remedy: Program or way to convert it.
    """

    start: int
    magic: bytes
    name: str
    remedy: str


NIFTI, TIFF = "convert it to NIfTI", "export it as TIFF or OME-TIFF"
FREESURFER = f"{NIFTI} (mri_convert a.mgz a.nii.gz)"
MINC = f"{NIFTI} (mnc2nii)"
ITK = "save it as NIfTI, NRRD or .mha with ITK or 3D Slicer"
PICTURE = "save it as PNG or TIFF"

NEIGHBOURS = (
    Neighbour(0, b"\0\0\0\x01\0\0", "FreeSurfer MGH", FREESURFER),
    Neighbour(0, b"mrtrix image", "MRtrix .mif", f"{NIFTI} (mrconvert a.mif a.nii.gz)"),
    Neighbour(0, b"\x89HDF\r\n\x1a\n", "HDF5 (MINC 2, Imaris, ilastik, MATLAB 7.3)", f"{NIFTI} or TIFF"),
    Neighbour(0, b"CDF\x01", "NetCDF (MINC 1)", MINC),
    Neighbour(0, b"CDF\x02", "NetCDF (MINC 1)", MINC),
    Neighbour(0, b"<nifti_image", "NIfTI as text (.nia)", "save it as .nii or .nii.gz"),
    Neighbour(0, b"\ntype = ", "the .HEAD half of an AFNI dataset", f"{NIFTI} (3dAFNItoNIFTI)"),
    Neighbour(0, b"# vtk DataFile", "VTK", ITK),
    Neighbour(0, b"<VTKFile", "VTK", ITK),
    Neighbour(252, b"\xef\xff\xe9\xb0", "GIPL", ITK),
    Neighbour(252, b"\x71\x9c\x79\x6c", "GIPL", ITK),
    Neighbour(0, b"ZISRAWFILE", "Zeiss CZI", TIFF),
    Neighbour(0, b"\xda\xce\xbe\x0a", "Nikon ND2", TIFF),
    Neighbour(0, b"\x70\0\0\0", "Leica LIF", TIFF),
    Neighbour(0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Olympus OIB or Zeiss ZVI", TIFF),
    Neighbour(0, b"SIS\0", "Olympus ETS, a part of VSI", TIFF),
    Neighbour(96, b"\xa0\xc0", "DeltaVision DV", TIFF),
    Neighbour(96, b"\xc0\xa0", "DeltaVision DV", TIFF),
    Neighbour(208, b"MAP ", "MRC", TIFF),
    Neighbour(0, b"ics_version", "ICS", TIFF),
    Neighbour(1, b"ics_version", "ICS", TIFF),
    Neighbour(0, b"MATLAB 5.0", "MATLAB", "write it with imwrite or niftiwrite"),
    Neighbour(0, b"SIMPLE  =", "FITS", "save it as TIFF"),
    Neighbour(0, b"\x93NUMPY", "NumPy", "send it with the Python client, or as TIFF or NIfTI"),
    Neighbour(0, b"GIF8", "GIF", PICTURE),
    Neighbour(0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000", PICTURE),
    Neighbour(0, b"\xff\x4f\xff\x51", "JPEG 2000", PICTURE),
    Neighbour(4, b"ftypavi", "AVIF", PICTURE),
    Neighbour(4, b"ftyphei", "HEIC", PICTURE),
    Neighbour(4, b"ftypmif1", "HEIF", PICTURE),
    Neighbour(0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", PICTURE),
    Neighbour(0, b"\xff\x0a", "JPEG XL", PICTURE),
    Neighbour(0, b"II\xbc", "JPEG XR", PICTURE),
    Neighbour(0, b"\x76\x2f\x31\x01", "OpenEXR", PICTURE),
    Neighbour(0, b"gimp xcf", "GIMP", PICTURE),
    *(Neighbour(0, b"P%d\n" % kind, "PNM (PGM, PPM, PAM)", PICTURE) for kind in range(1, 8)),
    Neighbour(0, b"8BPS", "Photoshop", PICTURE),
    Neighbour(0, b"%PDF", "PDF", "send the picture itself"),
    Neighbour(257, b"ustar", "tar", "send each file by itself, or images as a zip"),
    Neighbour(0, b"7z\xbc\xaf\x27\x1c", "7-Zip", "pack images as a zip"),
    Neighbour(0, b"Rar!", "RAR", "pack images as a zip"),
    Neighbour(0, b"BZh", "bzip2", "unpack it, or send .nii.gz"),
    Neighbour(0, b"\x28\xb5\x2f\xfd", "Zstandard", "unpack it, or send .nii.gz"),
    Neighbour(0, b"\xfd7zXZ\0", "xz", "unpack it, or send .nii.gz"),
)

# Bytes by which all are recognised.
PREFIX_BYTES = max(row.start + len(row.magic) for row in NEIGHBOURS)


def find(prefix: bytes) -> Neighbour | None:
    """Returns the format that a file begins with, or None.

    Args:
        prefix: First `PREFIX_BYTES` of the file.
    """
    return next((row for row in NEIGHBOURS if prefix[row.start :].startswith(row.magic)), None)
