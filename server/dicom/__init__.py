"""PACS: series fetched and answers stored over DICOMweb, and a DICOM node that modalities send to."""
